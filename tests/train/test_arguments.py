"""The flags that a user sees, and the checks of dataset files."""

import struct
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest
from megatron.core.transformer.enums import AttnBackend

from tests.harness.launch import REPOSITORY
from topk_megatron.config import TopKConfig
from topk_megatron.errors import DataError
from topk_megatron.train.arguments import (
    CPU_DEFAULTS,
    add_topk_arguments,
    dependent_defaults,
    describe_device,
)
from topk_megatron.train.data_files import check_data_files, count_documents, split_weights
from topk_megatron.train.main import announce


def test_help_explains_every_flag_of_the_group() -> None:
    group = add_topk_arguments(ArgumentParser())._action_groups[-1]
    assert group.title == "topk"
    assert len(group._group_actions) >= 10
    assert all(action.help for action in group._group_actions)


def test_help_of_the_whole_command_can_be_printed() -> None:
    script = str(REPOSITORY / "pretrain_topk_gpt.py")
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--topk-anneal-start-k K" in done.stdout
    assert "--tensor-model-parallel-size" in done.stdout


def test_every_cpu_default_is_an_argument_of_megatron() -> None:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    known = {action.dest for action in parser._actions}
    assert known >= set(CPU_DEFAULTS)


def made_dataset(prefix: Path, documents: int) -> str:
    """Write a dataset of two-byte tokens with one token per document."""
    (prefix.parent / f"{prefix.name}.bin").write_bytes(b"\0\0" * documents)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, documents, documents + 1)
    lengths = struct.pack(f"<{documents}i", *[1] * documents)
    offsets = struct.pack(f"<{documents}q", *range(0, 2 * documents, 2))
    ends = struct.pack(f"<{documents + 1}q", *range(documents + 1))
    (prefix.parent / f"{prefix.name}.idx").write_bytes(header + lengths + offsets + ends)
    return str(prefix)


def arguments(prefix: str, split: str | None, eval_iters: int = 1) -> Namespace:
    other = dict.fromkeys(["train_data_path", "valid_data_path", "test_data_path"])
    return Namespace(
        data_path=["0.5", prefix],
        data_args_path=None,
        split=split,
        eval_iters=eval_iters,
        tokenizer_model=None,
        **other,
    )


def test_we_count_documents_as_megatron_does(dataset: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    assert count_documents(str(dataset)) == len(IndexedDataset(str(dataset)))


def test_cut_off_files_are_named(tmp_path: Path) -> None:
    prefix = made_dataset(tmp_path / "a", 5)
    (tmp_path / "a.bin").write_bytes(b"\0" * 9)
    with pytest.raises(DataError, match="has 9 bytes where its index says 10"):
        count_documents(prefix)
    index = (tmp_path / "a.idx").read_bytes()
    (tmp_path / "a.idx").write_bytes(index[:-20])
    with pytest.raises(DataError, match="damaged or shorter than its header says"):
        count_documents(prefix)


class TestSplit:
    def test_each_part_needs_a_document(self, tmp_path: Path) -> None:
        check_data_files(arguments(made_dataset(tmp_path / "a", 38), "90,8,2"))
        with pytest.raises(DataError, match=r"leaves the test part .* \(38 documents\)"):
            check_data_files(arguments(made_dataset(tmp_path / "a", 38), None))
        with pytest.raises(DataError, match="leaves the validation part"):
            check_data_files(arguments(made_dataset(tmp_path / "b", 3), "95,5,0"))

    def test_a_part_that_is_never_read_needs_none(self, tmp_path: Path) -> None:
        check_data_files(arguments(made_dataset(tmp_path / "a", 3), "95,5,0", eval_iters=0))
        check_data_files(arguments(made_dataset(tmp_path / "a", 3), "100,0,0"))

    @pytest.mark.parametrize("text", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0"])
    def test_text_that_is_not_weights_is_refused(self, text: str) -> None:
        with pytest.raises(DataError, match="--split takes"):
            split_weights(text)

    def test_missing_weights_are_zero(self) -> None:
        assert split_weights("90,10") == [90, 10, 0]
        assert split_weights("98/1/1") == [98, 1, 1]


ATTENTION: dict[str, Any] = {
    "attention_backend": AttnBackend.auto,
    "softmax_type": "vanilla",
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "batch_invariant_mode": False,
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "torch's fused kernels"),
        ({"softmax_type": "learnable"}, "Megatron's own (--softmax-type learnable)"),
        (
            {"attention_backend": AttnBackend.unfused},
            "Megatron's own (--attention-backend unfused)",
        ),
    ],
)
def test_one_line_says_which_attention_runs_and_why(changes: dict[str, Any], said: str) -> None:
    args = Namespace(**{**ATTENTION, **changes}, transformer_impl="local")
    assert describe_device(args, "cpu").endswith(f"; attention: {said}")


def test_on_a_gpu_a_second_line_says_how_many_connections_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("topk_megatron.train.arguments.describe", lambda *_: "layers: ours")
    args = Namespace(**ATTENTION, transformer_impl="local")
    first, second = describe_device(args, "cuda").splitlines()
    assert first == "layers: ours; attention: torch's fused kernels"
    assert second.startswith("topk_megatron: CUDA_DEVICE_MAX_CONNECTIONS is ")
    args.transformer_impl = "transformer_engine"
    assert describe_device(args, "cuda").splitlines() == ["layers: ours", second]


def test_a_mask_is_made_with_the_data_only_where_it_is_more_than_causal() -> None:
    """It has an entry for every pair of tokens of every sample."""
    plain = Namespace(reset_attention_mask=False, spec=None)
    off = {"create_attention_mask_in_dataloader": False}
    assert dependent_defaults(plain, "cpu") == off
    assert dependent_defaults(Namespace(reset_attention_mask=True, spec=None), "cpu") == {}
    assert dependent_defaults(Namespace(reset_attention_mask=False, spec=["own", "x"]), "cpu") == {}


@pytest.mark.parametrize(
    ("iterations", "said"), [(8, True), (9, False), (20, False), (None, False)]
)
def test_annealing_that_outlasts_training_is_reported(
    iterations: int | None, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TopKConfig(
        hidden_size=64, num_layers=4, k=8, layers=(0, 1), anneal="linear", anneal_end=9
    )
    args = Namespace(rank=0, train_iters=iterations, transformer_impl="local", **ATTENTION)
    announce(args, config, "cpu")
    printed = capsys.readouterr().out
    assert "k 8 of 64 (value, linear from 64 over iterations 0 to 9) at layers 0, 1 of 4" in printed
    assert ("annealing ends at iteration 9, after the last one (8)" in printed) == said
