"""Each file of the ladder is what it says, is accepted by Megatron and the planner, and runs."""

import re
import subprocess
from argparse import ArgumentParser
from pathlib import Path

import pytest

from benchmarks.plan_memory import megatron_arguments
from tests.harness.launch import REPOSITORY, pretrain
from tests.plan.conftest import LADDER, config_flags
from topk_megatron.compat import prepare_device
from topk_megatron.plan import command_lines as flags_module
from topk_megatron.plan.assumptions import cluster_of
from topk_megatron.plan.command_lines import layout_in, shape_of
from topk_megatron.plan.dry_run import rank_zero
from topk_megatron.plan.report import short
from topk_megatron.plan.search import estimate, search, tensor_obstacle
from topk_megatron.train.arguments import add_topk_arguments

# Nodes, and GPUs per node, that the comment at the top of each file names.
HARDWARE = {
    "10m": (1, 1),
    "100m": (1, 8),
    "1b": (1, 8),
    "7b": (8, 8),
    "70b": (64, 8),
    "500b": (384, 8),
}


def text_of(name: str) -> str:
    return (REPOSITORY / "configs" / f"{name}.args").read_text()


def test_ladder_is_whole() -> None:
    assert {path.stem for path in (REPOSITORY / "configs").iterdir()} == set(LADDER)


@pytest.mark.parametrize("name", LADDER)
def test_parameters_are_those_of_the_name(name: str) -> None:
    assert shape_of(config_flags(name)).parameters == pytest.approx(LADDER[name], rel=0.03)


@pytest.mark.parametrize("name", LADDER)
def test_comment_tells_the_truth(name: str) -> None:
    shape, text = shape_of(config_flags(name)), text_of(name)
    parameters = re.search(rf"^# {name}: ([\d.]+) (m|b)illion parameters", text)
    assert parameters is not None
    size = float(parameters[1]) * {"m": 1e6, "b": 1e9}[parameters[2]]
    assert size == pytest.approx(shape.parameters, rel=5e-3)
    assert f"{shape.layers} layers, H {shape.hidden}, vocabulary {shape.vocabulary:,}" in text
    tokens = re.search(
        r"tokens +([\d.]+) (b|tr)illion \(([\d,]+) steps of .*\), (\d+) per parameter", text
    )
    assert tokens is not None
    steps = int(tokens[3].replace(",", ""))
    assert steps == shape.iterations
    trained = steps * shape.tokens
    assert float(tokens[1]) * {"b": 1e9, "tr": 1e12}[tokens[2]] == pytest.approx(trained, rel=0.05)
    assert int(tokens[4]) == pytest.approx(trained / shape.parameters, abs=1)
    layout = layout_in(config_flags(name))
    assert f"# layout     TP {layout.tp}, PP {layout.pp};" in text


@pytest.mark.parametrize("name", LADDER)
def test_sizes_divide_and_fill_the_hardware(name: str) -> None:
    shape = shape_of(config_flags(name))
    nodes, gpus_per_node = HARDWARE[name]
    layout = layout_in(config_flags(name), nodes * gpus_per_node)
    assert tensor_obstacle(shape, layout.tp) is None
    assert shape.layers % layout.pp == 0
    assert shape.global_batch % (shape.micro_batch * layout.dp) == 0
    assert shape.topk.k == shape.hidden // 16
    assert shape.topk.layers == tuple(range(shape.layers - 2))


@pytest.mark.parametrize("name", LADDER)
def test_planner_accepts_the_files_own_layout(name: str) -> None:
    shape = shape_of(config_flags(name))
    cluster = cluster_of("h100", *HARDWARE[name], "ndr")
    own = estimate(shape, layout_in(config_flags(name), cluster.gpus), cluster)
    assert own.bytes <= cluster.memory
    best = search(shape, cluster).fitting[0]
    assert own.time.total <= 1.1 * best.time.total


@pytest.mark.parametrize("name", LADDER)
def test_megatron_reads_what_the_planner_reads(name: str) -> None:
    shape = shape_of(config_flags(name))
    nodes, gpus_per_node = HARDWARE[name]
    prepare_device()
    with rank_zero(nodes * gpus_per_node):
        args = megatron_arguments(config_flags(name))
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    assert (
        *(args.num_layers, args.hidden_size, args.ffn_hidden_size, args.num_attention_heads),
        *(groups, args.kv_channels, args.padded_vocab_size, args.seq_length, args.train_iters),
        *(args.micro_batch_size, args.global_batch_size, args.data_parallel_size),
    ) == (
        *(shape.layers, shape.hidden, shape.ffn, shape.heads),
        *(shape.groups, shape.head_size, shape.padded(args.tensor_model_parallel_size)),
        *(shape.sequence, shape.iterations, shape.micro_batch, shape.global_batch),
        layout_in(config_flags(name), nodes * gpus_per_node).dp,
    )


def test_flags_that_the_planner_names_are_megatrons() -> None:
    prepare_device()
    from megatron.training.arguments import add_megatron_arguments

    parser = add_topk_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    known = {option for action in parser._actions for option in action.option_strings}
    assert set(flags_module._REFUSED) | set(flags_module._LAYOUT_FLAGS) <= known
    named = {f"--{name}" for name in (*flags_module._NUMBERS, *flags_module._SWITCHES)}
    assert named <= known


@pytest.mark.parametrize("name", LADDER)
def test_shell_reads_the_words_that_the_planner_reads(name: str) -> None:
    """examples/slurm/ reads argument files with `flags_of`."""
    script = f". examples/slurm/common.sh; flags_of configs/{name}.args"
    done = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.split() == config_flags(name)


def test_counts_are_shortened_to_three_digits() -> None:
    assert [short(n) for n in (999, 97_530_000, 7.047e9, 4.194e12)] == [
        *("999", "97.5M", "7.05B", "4.19T")
    ]


@pytest.mark.slow
@pytest.mark.distributed
def test_smallest_trains(dataset: Path, tokenizer: Path, tmp_path: Path) -> None:
    run = pretrain(
        1,
        *config_flags("10m"),
        *("--micro-batch-size", "1", "--global-batch-size", "2", "--train-iters", "3"),
        *("--lr-warmup-iters", "1", "--log-interval", "1", "--eval-iters", "1"),
        *("--data-path", dataset, "--data-cache-path", tmp_path, "--num-workers", "0"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer),
        tensorboard=tmp_path / "tb",
    )
    assert run.returncode == 0, run.output
    losses = run.losses()
    assert list(losses) == [1, 2, 3]
    assert losses[3] < losses[1]
