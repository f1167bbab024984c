"""Builds a bundle for scripts/gpu_check.sh: what a GPU machine without a network lacks.

    python scripts/gpu_bundle.py --corpus 'text/*.jsonl.zst'      # writes build/gpu_bundle
    python scripts/gpu_bundle.py --check build/gpu_bundle

The bundle holds wheels, the kernel libraries for compute capability 9.0 (H100, H200), CCCL's
batched top-k as a baseline, a tokenised slice of text, and manifest.json with the size and SHA-256
of every file. Wheels come from the index that pip is configured for. A part that cannot be made is
left out and named; gpu_check.sh then does without it, or builds it there. The libraries use torch's
stable ABI: they load in any torch from 2.10 on, for the CUDA major version of the torch here.

On the GPU machine gpu_check.sh calls --unpack, which puts the wheels into a folder, and --install,
which puts the libraries into topk_megatron/ops unless they were built from other sources than those
there. Both need Python alone, and use nothing if a file is not that of the manifest.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
BUNDLE = REPOSITORY / "build" / "gpu_bundle"
OPS = REPOSITORY / "topk_megatron" / "ops"
LIMIT = 64 << 20  # what the working tree and the bundle may have together
MARGIN = 2 << 20
PACKAGES = ("megatron-core",)  # all that training needs beyond docs/gpu_check.md's list
CCCL_HEADERS = "nvidia-cuda-cccl>=13.3.5"
PYTHON_VERSION = "3.12"
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17, 5)] + ["manylinux2014_x86_64"]
# A wheel that the GPU machine's Python can use, by its last three tags.
WHEEL_FITS = re.compile(
    r"-(cp312-(cp312|abi3)|cp3\d-abi3|py3-none|py2\.py3-none)-(any|\S*manylinux\S*x86_64)\.whl$"
)
CXX_OF_TORCH = re.compile(r"^_ZNK?(2at|3c10|5torch)", re.MULTILINE)


class BundleError(Exception):
    """The bundle cannot be made or used; the message says what to do."""


def run(command: list[Any], **more: Any) -> str:
    """Run a command and return its output; if it fails, the error carries the output's end."""
    try:
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, check=False, **more
        )
    except OSError as problem:
        raise BundleError(f"{command[0]} cannot be run: {problem}") from None
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip()[-600:]
        raise BundleError(f"{Path(str(command[0])).name} failed: {last}")
    return done.stdout


def pinned(package: str) -> str:
    """Return the package with its version from constraints.txt."""
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        if line.lower().startswith(f"{package.lower()}=="):
            return line.strip()
    raise BundleError(f"constraints.txt has no line {package}==…")


def download(requirement: str, folder: Path) -> None:
    """Fetch the wheel that fits the GPU machine, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", PYTHON_VERSION, "--implementation", "cp"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    run([*command, "--dest", folder, requirement])


def add_wheels(bundle: Path) -> str:
    """Download the wheels."""
    for package in PACKAGES:
        download(pinned(package), bundle / "wheels")
    return ", ".join(path.name for path in sorted((bundle / "wheels").glob("*.whl")))


def sources_stamp() -> str:
    """Return a hash of everything that the kernel libraries are built from."""
    digest = hashlib.sha256()
    for path in [REPOSITORY / "setup.py", *sorted((OPS / "csrc").iterdir())]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def check_stable(library: Path) -> None:
    """Refuse a library that would load in one version of torch only."""
    symbols = run(["nm", "-D", "--undefined-only", library])
    names = "\n".join(line.split()[-1] for line in symbols.splitlines() if line.strip())
    if found := CXX_OF_TORCH.search(names):
        raise BundleError(f"{library.name} uses torch's unstable C++ interface ({found[0]}…)")


def add_kernels(bundle: Path) -> str:
    """Build both kernel libraries from the sources here."""
    forced = {"TOPK_MEGATRON_BUILD_CPU": "force", "TOPK_MEGATRON_BUILD_CUDA": "force"}
    environment = {**os.environ, **forced, "TORCH_CUDA_ARCH_LIST": "9.0"}
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", temporary]
        command += ["--build-temp", f"{temporary}/objects"]
        run(command, cwd=REPOSITORY, env=environment)
        for library in sorted(Path(temporary).rglob("_topk_mask_*.so")):
            run(["strip", library])
            check_stable(library)
            (bundle / "kernels").mkdir(exist_ok=True)
            shutil.copy2(library, bundle / "kernels")
    (bundle / "kernels" / "sources.sha256").write_text(sources_stamp())
    return "sm_90 and CPU, stable ABI"


def add_cccl(bundle: Path) -> str:
    """Build CCCL's batched top-k with the headers of NVIDIA's wheel, newer than the toolkit's."""
    with tempfile.TemporaryDirectory() as temporary:
        download(CCCL_HEADERS, Path(temporary))
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(temporary)
        (header,) = Path(temporary).rglob("device_batched_topk.cuh")
        library = bundle / "kernels" / "libcccl_topk.so"
        library.parent.mkdir(exist_ok=True)
        command = ["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90,code=sm_90", "-shared"]
        command += ["-Xcompiler=-fPIC", f"-I{header.parents[2]}"]
        run([*command, REPOSITORY / "benchmarks/gpu/cccl_topk.cu", "-o", library])
        run(["strip", library])
        return wheel.name.split("-py3")[0]


def tree_bytes() -> int:
    """Return the size of the working tree: what git tracks or would track."""
    listed = run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=REPOSITORY)
    paths = [REPOSITORY / name for name in listed.split("\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def bundle_bytes(bundle: Path) -> int:
    """Return the size of all files of the bundle."""
    return sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())


def take_text(patterns: list[str], target: Path, limit: int) -> int:
    """Write the first documents, up to `limit` bytes of text, as JSON lines; return their bytes."""
    from topk_megatron.errors import UserError
    from topk_megatron.text.reading import read_texts

    size = 0
    try:
        with target.open("w") as file:
            for text in read_texts(patterns):
                size += len(text.encode())
                if size > limit:
                    break
                file.write(json.dumps({"text": text}) + "\n")
    except UserError as problem:
        raise BundleError(str(problem)) from None
    return min(size, limit)


def add_corpus(bundle: Path, options: argparse.Namespace) -> str:
    """Train a tokenizer on a slice of the text, and tokenise as much as still fits."""
    room = options.limit - MARGIN - tree_bytes() - bundle_bytes(bundle)
    limit = min(room, int(options.corpus_mib * (1 << 20)))
    if limit < 1 << 20:
        raise BundleError(f"{room / (1 << 20):.1f} MiB are left, too few for text")
    corpus, tools = bundle / "corpus", REPOSITORY / "tools"
    corpus.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    model = corpus / "tokenizer.model"
    with tempfile.TemporaryDirectory() as temporary:
        sample, text = Path(temporary) / "sample.jsonl", Path(temporary) / "text.jsonl"
        take_text(options.corpus, sample, options.tokenizer_mib << 20)
        command = [sys.executable, tools / "train_tokenizer.py", "--input", sample]
        command += ["--output", model, "--vocab-size", options.vocab_size]
        run(command, env=environment)
        limit -= model.stat().st_size
        command = [sys.executable, tools / "preprocess_data.py", "--input", text, "--overwrite"]
        command += ["--output-prefix", corpus / "text", "--tokenizer-model", model]
        command += ["--workers", options.workers]
        # Two bytes a token. The sample says how much text makes one; other text may differ.
        wanted = int(limit / 2 * bytes_per_token(model, sample) * 0.92)
        while True:
            take_text(options.corpus, text, wanted)
            run(command, env=environment)
            size = sum(path.stat().st_size for path in corpus.glob("text.*"))
            if size <= limit:
                break
            wanted = int(wanted * limit / size * 0.99)
    tokens = (corpus / "text.bin").stat().st_size // 2
    return f"{tokens:,} tokens of {options.vocab_size:,} pieces"


def bytes_per_token(model: Path, sample: Path) -> float:
    """Measure a tokenizer on the first documents of a sample."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    lines = sample.read_text().split("\n")[:-1]
    texts = [json.loads(line)["text"] for line in lines[:: max(1, len(lines) // 200)]]
    tokens = sum(len(processor.encode(text)) for text in texts)
    return sum(len(text.encode()) for text in texts) / tokens


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Make every part that can be made, and return the manifest."""
    bundle: Path = options.bundle
    shutil.rmtree(bundle, ignore_errors=True)
    bundle.mkdir(parents=True)
    parts: dict[str, Callable[[], str]] = {
        "wheels": lambda: add_wheels(bundle),
        "kernels": lambda: add_kernels(bundle),
        "cccl": lambda: add_cccl(bundle),
    }
    if options.corpus:
        parts["corpus"] = lambda: add_corpus(bundle, options)
    made: dict[str, str] = {}
    for name, make in parts.items():
        try:
            made[name] = make()
        except BundleError as problem:
            made[name] = f"left out: {problem}"
        print(f"gpu_bundle: {name}: {made[name]}", flush=True)
    files = {
        str(path.relative_to(bundle)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(bundle.rglob("*"))
        if path.is_file()
    }
    manifest = {"parts": made, "bytes": bundle_bytes(bundle), "files": files}
    manifest["tree_bytes"] = tree_bytes()
    (bundle / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return manifest


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check(bundle: Path) -> list[str]:
    """Return what is wrong with a bundle, in words."""
    try:
        manifest = json.loads((bundle / "manifest.json").read_text())
    except (OSError, ValueError) as problem:
        return [f"{bundle} is no bundle of scripts/gpu_bundle.py: {problem}"]
    wrong = []
    for name, facts in manifest["files"].items():
        path = bundle / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif sha256_of(path) != facts["sha256"]:
            wrong.append(f"{name} is not the file of the manifest (SHA-256 differs)")
        elif name.endswith(".whl") and not WHEEL_FITS.search(name):
            wrong.append(f"{name} does not fit Python {PYTHON_VERSION} on x86-64 Linux")
    return wrong


def unpack(bundle: Path, site: Path) -> None:
    """Check the bundle, and unpack its wheels into `site`."""
    if wrong := check(bundle):
        raise BundleError("; ".join(wrong))
    site.mkdir(parents=True, exist_ok=True)
    for wheel in sorted((bundle / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        print(f"gpu_bundle: unpacked {wheel.name} into {site}")


def install(bundle: Path) -> None:
    """Check the bundle, and put its libraries into the package if they are of the sources here."""
    if wrong := check(bundle):
        raise BundleError("; ".join(wrong))
    stamp = bundle / "kernels" / "sources.sha256"
    if not stamp.is_file():
        print("gpu_bundle: no kernel libraries in the bundle")
    elif stamp.read_text() != sources_stamp():
        print("gpu_bundle: the kernel libraries are of other sources and were not installed")
    else:
        for library in sorted((bundle / "kernels").glob("_topk_mask_*.so")):
            shutil.copy2(library, OPS)
            print(f"gpu_bundle: installed {library.name}")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("bundle", type=Path, nargs="?", default=BUNDLE, help="folder to write (build/gpu_bundle)")
    add("--corpus", nargs="+", help="text files or globs for the training step")
    add("--corpus-mib", type=float, default=64, help="most MiB of tokens (default: what fits)")
    add("--tokenizer-mib", type=int, default=8, help="MiB of text that trains the tokenizer")
    add("--vocab-size", type=int, default=16384, help="pieces of the tokenizer")
    add("--workers", type=int, default=os.cpu_count(), help="tokenising processes")
    add("--limit", type=int, default=LIMIT, help="bytes of the working tree and bundle together")
    add("--check", type=Path, metavar="BUNDLE", help="check a bundle, and make none")
    add("--unpack", type=Path, metavar="BUNDLE", help="check a bundle and unpack its wheels")
    add("--install", type=Path, metavar="BUNDLE", help="check a bundle and install its libraries")
    add("--site", type=Path, default=REPOSITORY / "build" / "gpu_site", help="where wheels go")
    return parser.parse_args()


def main() -> None:
    """Build, check or install a bundle."""
    options = parse()
    if options.unpack is not None:
        unpack(options.unpack, options.site)
        return
    if options.install is not None:
        install(options.install)
        return
    if options.check is not None:
        if wrong := check(options.check):
            raise BundleError("; ".join(wrong))
        print(f"gpu_bundle: {options.check} is complete")
        return
    manifest = build(options)
    total = manifest["bytes"] + manifest["tree_bytes"]
    sizes = f"{manifest['bytes'] / (1 << 20):.1f} MiB, with the working tree"
    print(f"gpu_bundle: {options.bundle}: {sizes} {total / (1 << 20):.1f} MiB")
    if total > options.limit:
        limit = f"{options.limit / (1 << 20):.0f} MiB"
        raise BundleError(f"that exceeds {limit}; give a smaller --corpus-mib")


if __name__ == "__main__":
    try:
        main()
    except BundleError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
