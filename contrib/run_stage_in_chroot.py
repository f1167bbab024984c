#!/usr/bin/env python3
"""Runs a Debian-based stage of the Dockerfile without Docker: its own steps, in a chroot.

    contrib/run_stage_in_chroot.py analysis DIR                     build, check health, run CMD
    contrib/run_stage_in_chroot.py analysis DIR -- tools/analyze.py record --help

The script reads the Dockerfile and carries out its instructions: FROM debian:… makes a root with
debootstrap, RUN runs in it, COPY obeys .dockerignore, and at the end HEALTHCHECK and ENTRYPOINT run
as USER. It needs root and the package debootstrap, but no engine, daemon or image. RUN steps get a
copy of the host's certificates and access to pip's cache, the only part of the host that they can
write.

Unlike Docker it has no layers, only one platform, and no isolation but a mount and a PID namespace.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from dockerfile import expand, ignored, parse

PROJECT = Path(__file__).resolve().parents[1]
LENT_VARIABLES = ("PIP_DEFAULT_TIMEOUT", "PIP_RETRIES")
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
LENT_CERTIFICATES = "/run/lent-certificates.crt"
DEVICES = ("null", "zero", "full", "random", "urandom")
UNSUITABLE = 3


@dataclass
class Root:
    """A root that is being built, and the settings for its later steps."""

    path: Path
    variables: dict[str, str]
    directory: str = "/"
    user: str = "root"
    health: list[str] | None = None
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


class Builder:
    """Carries out stages, each in a root inside one directory."""

    def __init__(self, directory: Path, dockerfile: Path) -> None:
        self.directory = directory
        self.stages = parse(dockerfile.read_text())
        lines = (PROJECT / ".dockerignore").read_text().splitlines()
        self.patterns = [line for line in lines if line and not line.startswith("#")]
        self.roots: dict[str, Root] = {}

    def build(self, name: str) -> Root:
        """Build a stage and the stages that it needs."""
        if name in self.roots:
            return self.roots[name]
        if name not in self.stages:
            stop(f"the Dockerfile has no stage {name}; it has {', '.join(self.stages)}")
        stage = self.stages[name]
        for keyword, value in stage.steps:
            if keyword == "COPY" and (origin := re.match(r"--from=(\S+)", value)):
                self.build(origin[1])
        root = self.roots[name] = self.start(name, stage.base)
        for keyword, value in stage.steps:
            begun = time.perf_counter()
            self.carry_out(root, keyword, value)
            said = " ".join(value.split())
            print(
                f"{name}: {time.perf_counter() - begun:6.1f} s  {keyword} {said[:90]}", flush=True
            )
        return root

    def start(self, name: str, base: str) -> Root:
        """Copy an empty Debian, which is made once."""
        image = re.fullmatch(r"debian:(\w+)-slim", base)
        if not image:
            stop(f"stage {name} starts from {base}; only debian:SUITE-slim can be made here")
        suite = self.directory / f"debian-{image[1]}"
        if not suite.exists():
            begun = time.perf_counter()
            partial = suite.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            command = ["debootstrap", "--variant=minbase", image[1], str(partial), *mirror()]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                stop(f"debootstrap failed: {(done.stdout + done.stderr)[-2000:]}", UNSUITABLE)
            partial.rename(suite)
            print(f"{name}: {time.perf_counter() - begun:6.1f} s  FROM {base}", flush=True)
        path = self.directory / name
        shutil.rmtree(path, ignore_errors=True)
        subprocess.run(["cp", "--archive", str(suite), str(path)], check=True)
        default = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return Root(path, {"PATH": default})

    def carry_out(self, root: Root, keyword: str, value: str) -> None:
        """Carry out one instruction."""
        if keyword == "RUN":
            mounts = re.findall(r"--mount=type=cache,target=(\S+)", value)
            command = re.sub(r"--mount=\S+\s+", "", value)
            if run(root, ["/bin/sh", "-c", command], root.user, mounts):
                stop(f"RUN failed: {command}")
        elif keyword == "COPY":
            self.copy(root, value)
        elif keyword == "ARG":
            given = {name: os.environ[name] for name in value.split() if name in os.environ}
            root.variables.update(given)
        elif keyword == "ENV":
            for pair in shlex.split(value):
                name, _, content = pair.partition("=")
                root.variables[name] = expand(content, root.variables)
        elif keyword == "WORKDIR":
            root.directory = value
            inside(root, value).mkdir(parents=True, exist_ok=True)
        elif keyword == "USER":
            root.user = value
        elif keyword == "HEALTHCHECK":
            root.health = json.loads(value[value.index("[") :])
        elif keyword == "ENTRYPOINT":
            root.entrypoint = json.loads(value)
        elif keyword == "CMD":
            root.command = json.loads(value)
        elif keyword != "STOPSIGNAL":
            stop(f"this script does not know the instruction {keyword}")

    def copy(self, root: Root, value: str) -> None:
        """Carry out COPY [--from=STAGE] SOURCE… TARGET."""
        origin = re.match(r"--from=(\S+)\s+", value)
        *sources, target = (value[origin.end() :] if origin else value).split()
        goal = inside(root, target)
        for source in sources:
            if origin:
                place = inside(self.roots[origin[1]], source)
                many = target.endswith("/") or len(sources) > 1
                goal.parent.mkdir(parents=True, exist_ok=True)
                to = goal / place.name if many else goal
                # Links cost neither time nor space; nothing changes files in place later.
                subprocess.run(["cp", "--archive", "--link", str(place), str(to)], check=True)
            else:
                self.copy_context(source, goal, target.endswith("/") or len(sources) > 1)

    def copy_context(self, source: str, goal: Path, into: bool) -> None:
        """Copy files of the checkout, except those that .dockerignore excludes."""
        place = PROJECT / source
        files = [place] if place.is_file() else [f for f in place.rglob("*") if f.is_file()]
        files = [f for f in files if ".git" not in f.relative_to(PROJECT).parts]
        files = [f for f in files if not ignored(f.relative_to(PROJECT).as_posix(), self.patterns)]
        if not files:
            stop(f"COPY {source}: not in the checkout, or .dockerignore excludes it")
        for file in files:
            if place.is_file():
                to = goal / file.name if into else goal
            else:
                to = goal / file.relative_to(place)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, to)


def inside(root: Root, path: str) -> Path:
    """Return where a path of the container is on this machine."""
    return root.path / os.path.normpath(os.path.join(root.directory, path)).lstrip("/")


def mirror() -> list[str]:
    """Return the mirror from which this machine's apt gets Debian; debootstrap has a default."""
    listing = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    found = subprocess.run(listing, capture_output=True, text=True).stdout.splitlines()
    return [uri for uri in found if uri.rstrip("/").endswith("/debian")][:1]


def run(root: Root, command: list[str], user: str, caches: list[str] | None = None) -> int:
    """Run a command in the root, in mount and PID namespaces of its own.

    Args:
        root: The root.
        command: The command and its arguments.
        user: The user to run as.
        caches: Where RUN wants pip's cache; None outside RUN, when nothing of the host is lent.

    Returns:
        The exit code.
    """
    lent = {} if caches is None else lent_variables()
    variables = {**lent, **root.variables, "HOME": home(root, user)}
    program = ["env", "-i", *(f"{k}={v}" for k, v in variables.items())]
    program += ["sh", "-c", f"cd {shlex.quote(root.directory)} && exec {shlex.join(command)}"]
    within = ["chroot", f"--userspec={user}", str(root.path), *program]
    script = "\n".join(["set -e", *mounts(root, caches), f"exec {shlex.join(within)}"])
    namespace = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script]
    return subprocess.run(namespace, stdin=subprocess.DEVNULL).returncode


def mounts(root: Root, caches: list[str] | None) -> list[str]:
    """Return the shell lines that mount what programs need into a root.

    The scripts of packages run there as root, so only pip's cache may be writable on this machine:
    /dev has only a few nodes, and the certificates are a copy.
    """
    lines = [f"mount -t proc proc {root.path}/proc", f"mount -t tmpfs tmpfs {root.path}/dev"]
    for node in DEVICES:
        lines += [
            f"touch {root.path}/dev/{node}",
            f"mount --bind /dev/{node} {root.path}/dev/{node}",
        ]
    lines.append(f"mkdir -m 1777 {root.path}/dev/shm")
    lines.append(f"mount -t tmpfs tmpfs {root.path}/run")
    if caches is not None and Path(CERTIFICATES).is_file():
        lines.append(f"cp {CERTIFICATES} {root.path}{LENT_CERTIFICATES}")
    for target in caches or []:
        cache, place = Path.home() / ".cache" / "pip", inside(root, target)
        cache.mkdir(parents=True, exist_ok=True)
        place.mkdir(parents=True, exist_ok=True)
        lines.append(f"mount --bind {cache} {place}")
    return lines


def lent_variables() -> dict[str, str]:
    """Return the variables that pip needs to reach the network from this machine."""
    found = {name: os.environ[name] for name in LENT_VARIABLES if name in os.environ}
    if Path(CERTIFICATES).is_file():
        found |= {"PIP_CERT": LENT_CERTIFICATES, "SSL_CERT_FILE": LENT_CERTIFICATES}
    return found


def home(root: Root, user: str) -> str:
    """Return a user's home directory, by name or number, as Docker sets it."""
    for line in (root.path / "etc" / "passwd").read_text().splitlines():
        name, _, number, _, _, directory, _ = line.split(":")
        if user in (name, number):
            return directory
    return "/"


def stop(reason: str, code: int = 1) -> NoReturn:
    """Exit with one line."""
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(code)


def main() -> int:
    """Build, then do what `docker run` would do; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage")
    parser.add_argument("directory", type=Path, help="directory of the roots; can be reused")
    parser.add_argument("arguments", nargs="*", help="after --: replaces CMD")
    parser.add_argument("--dockerfile", type=Path, default=PROJECT / "Dockerfile")
    args = parser.parse_args()
    if os.geteuid() or not shutil.which("debootstrap"):
        stop("this needs root and debootstrap", UNSUITABLE)
    args.directory.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that programs in the root end too
    root = Builder(args.directory.resolve(), args.dockerfile).build(args.stage)
    size = subprocess.run(["du", "-sm", str(root.path)], capture_output=True, text=True).stdout
    print(f"{args.stage}: {size.split()[0]} MB in {root.path}", flush=True)
    if root.health:
        code = run(root, root.health, root.user)
        print(f"HEALTHCHECK: {'healthy' if code == 0 else f'unhealthy ({code})'}", flush=True)
        if code:
            return code
    return run(root, [*root.entrypoint, *(args.arguments or root.command)], root.user)


if __name__ == "__main__":
    sys.exit(main())
