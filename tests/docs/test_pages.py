"""Every link in the pages leads somewhere, and every command has the flags that it shows."""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.harness.forks import REPOSITORY, run_forked

PAGES = sorted(
    [
        *REPOSITORY.glob("*.md"),
        *(REPOSITORY / "docs").rglob("*.md"),
        *(REPOSITORY / "examples").rglob("*.md"),
        *(REPOSITORY / "benchmarks" / "results").glob("*.md"),
    ]
)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
# What may precede a command in a shell, and abbreviations of commands.
PREFIX = re.compile(r"^(?:\$ |[A-Z_]+=\S+ )*")
ALIASES = {"$analyze": "python tools/analyze.py"}


@dataclass(frozen=True)
class Command:
    """A command shown on a page."""

    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}: {self.text}"


def blocks(page: Path) -> list[tuple[int, str]]:
    """Return the lines of code blocks with their numbers, continued lines joined."""
    found: list[tuple[int, str]] = []
    fenced = False
    pending = ""
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        if not (fenced or line.startswith("    ")) and not pending:
            continue
        pending += line.strip()
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        found.append((number, pending))
        pending = ""
    return found


def commands() -> list[Command]:
    found = []
    for page in PAGES:
        for number, line in blocks(page):
            text = PREFIX.sub("", line)
            for alias, command in ALIASES.items():
                text = text.replace(alias, command)
            if re.match(r"(python (tools|benchmarks|examples)/|torchrun |make |sbatch )", text):
                found.append(Command(page, number, re.split(r"\s+#\s", text)[0]))
    return found


COMMANDS = commands()


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if "://" in target:
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert REPOSITORY in file.parents, target
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


def test_pages_show_commands() -> None:
    assert len(COMMANDS) > 40
    assert {"README.md", "tutorial.md", "analysis.md"} <= {c.page.name for c in COMMANDS}


@cache
def help_of(script: str, subcommand: str | None) -> str:
    arguments = [subcommand, "--help"] if subcommand else ["--help"]
    preload = "megatron" if script == "pretrain_topk_gpt.py" else "plain"
    done = run_forked(REPOSITORY / script, *arguments, preload=preload)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def words_of(command: Command) -> list[str]:
    text = re.sub(r"[…`]|\.\.\.", "", command.text)
    for end in (" > ", " | ", " && ", "; "):
        text = text.split(end)[0]
    return shlex.split(text)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_exists_with_its_flags(command: Command) -> None:
    words = words_of(command)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert {w for w in words[1:] if "=" not in w} <= set(targets)
        return
    if words[0] == "sbatch":
        (script,) = [w for w in words if w.endswith((".sbatch", ".sh"))]
        written_by_the_planner = script.startswith("runs/")
        assert written_by_the_planner or (REPOSITORY / script).exists()
        return
    place = next((n for n, w in enumerate(words) if w.endswith(".py")), None)
    assert place is not None, command
    script = words[place]
    assert (REPOSITORY / script).exists()
    rest = words[place + 1 :]
    has_subcommands = script in ("tools/analyze.py", "tools/convert_checkpoint.py")
    subcommand = rest[0] if has_subcommands and rest and not rest[0].startswith("-") else None
    shown = help_of(script, subcommand)
    for word in rest:
        if word == "--":
            break
        if re.match(r"--[a-z]", word):
            flag = word.split("=")[0]
            assert re.search(rf"{re.escape(flag)}(?![\w-])", shown), f"{script} has no {flag}"
