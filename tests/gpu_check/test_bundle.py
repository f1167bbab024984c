"""scripts/gpu_bundle.py: what it checks and installs; nothing is downloaded or compiled here."""

import json
import shutil
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest

from scripts import gpu_bundle
from tests.harness.launch import REPOSITORY

FITTING = (
    "megatron_core-0.19.2-cp312-cp312-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "einops-0.8.2-py3-none-any.whl",
    "six-1.17.0-py2.py3-none-any.whl",
    "safetensors-0.8.0-cp38-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
)
UNFIT = (
    "megatron_core-0.19.2-cp313-cp313-manylinux_2_28_x86_64.whl",
    "megatron_core-0.19.2-cp312-cp312-manylinux_2_28_aarch64.whl",
    "megatron_core-0.19.2-cp312-cp312-win_amd64.whl",
    "megatron_core-0.19.2.tar.gz",
)


@pytest.mark.parametrize("name", FITTING)
def test_wheels_that_fit_are_recognised(name: str) -> None:
    assert gpu_bundle.WHEEL_FITS.search(name)


@pytest.mark.parametrize("name", UNFIT)
def test_wheels_that_do_not_fit_are_recognised(name: str) -> None:
    assert not gpu_bundle.WHEEL_FITS.search(name)


def test_the_wheel_is_that_of_the_constraints() -> None:
    assert gpu_bundle.pinned("megatron-core").startswith("megatron-core==0.")
    with pytest.raises(gpu_bundle.BundleError, match="no line nothing=="):
        gpu_bundle.pinned("nothing")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of one wheel, two libraries of these sources and a text, made without tools."""

    def add_wheels(folder: Path) -> str:
        (folder / "wheels").mkdir()
        with zipfile.ZipFile(folder / "wheels" / FITTING[0], "w") as archive:
            archive.writestr("megatron/core/__init__.py", "here = True\n")
        return "a wheel"

    def add_kernels(folder: Path) -> str:
        (folder / "kernels").mkdir()
        for name in ("cpu", "cuda"):
            (folder / "kernels" / f"_topk_mask_{name}.so").write_text(f"{name} library")
        (folder / "kernels" / "sources.sha256").write_text(gpu_bundle.sources_stamp())
        return "libraries"

    def add_cccl(folder: Path) -> str:
        raise gpu_bundle.BundleError("nvcc cannot be run")

    for function in (add_wheels, add_kernels, add_cccl):
        monkeypatch.setattr(gpu_bundle, function.__name__, function)
    ops = tmp_path / "ops"
    shutil.copytree(gpu_bundle.OPS / "csrc", ops / "csrc")
    monkeypatch.setattr(gpu_bundle, "OPS", ops)
    folder = tmp_path / "bundle"
    gpu_bundle.build(Namespace(bundle=folder, corpus=None))
    return folder


def test_a_part_that_cannot_be_made_is_left_out_and_named(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["parts"]["cccl"] == "left out: nvcc cannot be run"
    assert manifest["parts"]["kernels"] == "libraries"
    assert set(manifest["files"]) == {
        f"wheels/{FITTING[0]}",
        *(f"kernels/{name}" for name in ("_topk_mask_cpu.so", "_topk_mask_cuda.so")),
        "kernels/sources.sha256",
    }
    assert gpu_bundle.check(bundle) == []


def test_installing_unpacks_wheels_and_puts_libraries_in_place(
    bundle: Path, tmp_path: Path
) -> None:
    gpu_bundle.unpack(bundle, tmp_path / "site")
    gpu_bundle.install(bundle)
    assert (tmp_path / "site" / "megatron" / "core" / "__init__.py").is_file()
    assert (gpu_bundle.OPS / "_topk_mask_cuda.so").read_text() == "cuda library"


def test_libraries_of_other_sources_are_not_installed(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (gpu_bundle.OPS / "csrc" / "topk_mask_cuda.cu").write_text("// changed\n")
    gpu_bundle.install(bundle)
    assert not list(gpu_bundle.OPS.glob("*.so"))
    assert "are of other sources" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["changed", "missing", "unfit", "no manifest"])
def test_a_damaged_bundle_is_refused_before_anything_is_unpacked(
    damage: str, bundle: Path, tmp_path: Path
) -> None:
    library, manifest = bundle / "kernels" / "_topk_mask_cuda.so", bundle / "manifest.json"
    if damage == "changed":
        library.write_text("another library")
    elif damage == "missing":
        library.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        (bundle / "wheels" / FITTING[0]).rename(bundle / "wheels" / UNFIT[0])
        manifest.write_text(manifest.read_text().replace(FITTING[0], UNFIT[0]))
    words = {
        "changed": "_topk_mask_cuda.so is not the file of the manifest",
        "missing": "_topk_mask_cuda.so is missing",
        "unfit": "does not fit Python 3.12",
        "no manifest": "is no bundle of scripts/gpu_bundle.py",
    }
    with pytest.raises(gpu_bundle.BundleError, match=words[damage]):
        gpu_bundle.unpack(bundle, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_library_with_torchs_unstable_interface_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    symbols = {"stable": "  U aoti_torch_get_dim\n", "unstable": "  U _ZN2at6Tensor3addERKS0_\n"}
    monkeypatch.setattr(gpu_bundle, "run", lambda command: symbols[command[-1].name])
    gpu_bundle.check_stable(tmp_path / "stable")
    with pytest.raises(gpu_bundle.BundleError, match="unstable C\\+\\+ interface"):
        gpu_bundle.check_stable(tmp_path / "unstable")


def test_the_libraries_here_use_the_stable_interface_only() -> None:
    libraries = list(gpu_bundle.OPS.glob("_topk_mask_*.so"))
    if not libraries or shutil.which("nm") is None:
        pytest.skip("needs built libraries and nm")
    for library in libraries:
        gpu_bundle.check_stable(library)


def test_text_is_cut_at_the_limit(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": letter * 1000}) + "\n" for letter in "abcd"))
    assert gpu_bundle.take_text([str(text)], tmp_path / "slice.jsonl", 2500) == 2500
    lines = (tmp_path / "slice.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"][0] for line in lines] == ["a", "b"]


@pytest.mark.slow
def test_a_corpus_is_tokenised_within_its_limit(corpus: Path, tmp_path: Path) -> None:
    room = gpu_bundle.tree_bytes() + gpu_bundle.MARGIN + (2 << 20)
    options = Namespace(limit=room, corpus_mib=64, corpus=[f"{corpus}/*.txt"], tokenizer_mib=8)
    options.vocab_size, options.workers = 512, 1
    said = gpu_bundle.add_corpus(tmp_path, options)
    assert "pieces" in said
    assert gpu_bundle.bundle_bytes(tmp_path) <= 2 << 20
    assert {path.name for path in (tmp_path / "corpus").iterdir()} >= {
        *("tokenizer.model", "text.bin", "text.idx"),
    }


def test_a_corpus_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(gpu_bundle.BundleError, match="nowhere"):
        gpu_bundle.take_text([f"{tmp_path}/nowhere.txt"], tmp_path / "slice.jsonl", 100)


def test_too_little_room_for_text_is_named(tmp_path: Path) -> None:
    options = Namespace(limit=gpu_bundle.tree_bytes(), corpus_mib=64, corpus=["x"])
    with pytest.raises(gpu_bundle.BundleError, match="too few for text"):
        gpu_bundle.add_corpus(tmp_path, options)


def test_a_wrong_bundle_ends_in_one_line(tmp_path: Path) -> None:
    script = REPOSITORY / "scripts" / "gpu_bundle.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path} is no bundle")
    assert len(done.stderr.splitlines()) == 1
