"""Megatron builds what the plan counts, on every stage, in little memory and without hardware."""

import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.harness.launch import REPOSITORY
from tests.plan.conftest import SMALL, config_flags
from topk_megatron.compat import prepare_device
from topk_megatron.errors import ConfigError
from topk_megatron.plan.command_lines import layout_in, shape_of
from topk_megatron.plan.dry_run import check_shard, check_stage, dry_run, stage_table

MANY_RANKS = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
MANY_RANKS += ["--pipeline-model-parallel-size", "4"]
TRAINING = ["--train-iters", "1", "--lr", "1e-3"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1b", "70b", "500b"])
def test_every_stage_is_built_as_planned_in_two_gigabytes_and_a_minute(name: str) -> None:
    limit = 8 << 30  # of address space: one real matrix would end the process

    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "tools/plan.py", "--dry-run", f"configs/{name}.args"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert usage.ru_maxrss * 1024 < 2e9
    assert usage.ru_utime + usage.ru_stime < 60
    assert time.perf_counter() - start < 300  # even on a busy machine

    shape, layout = shape_of(config_flags(name)), layout_in(config_flags(name))
    rows = [line.split() for line in output.splitlines()[2:-1]]
    assert [int(row[0]) for row in rows] == list(range(layout.pp))
    built = [int(row[5].replace(",", "")) for row in rows]
    planned = [shape.stage_parameters(layout.tp, layout.pp, s) for s in range(layout.pp)]
    assert built == planned
    assert sum(int(row[2]) for row in rows) == shape.layers - 2  # of TopK


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--untie-embeddings-and-output-weights", "--topk-layers", "1,4-6"],
        ["--group-query-attention", "--num-query-groups", "2", "--qk-layernorm", "--add-qkv-bias"],
        ["--kv-channels", "16", "--ffn-hidden-size", "96", "--topk-site", "mlp",
         "--topk-mlp-k", "8"],
        ["--normalization", "LayerNorm", "--hidden-dropout", "0.1", "--topk-layers", "none"],
    ],
    ids=["plain", "untied", "grouped queries", "wide heads, MLP site", "LayerNorm, dense"],
)  # fmt: skip
@pytest.mark.parametrize("layout", [[], MANY_RANKS], ids=["one rank", "eight ranks"])
def test_megatron_builds_what_the_plan_counts(flags: list[str], layout: list[str]) -> None:
    flags = SMALL + flags
    if flags[-1:] == ["8"]:  # the MLP site has no k of the residual stream
        cut = flags.index("--topk-k")
        flags = flags[:cut] + flags[cut + 2 :]
    shape = shape_of(flags)
    stages = dry_run([*flags, *TRAINING, *layout])
    assert [layer for stage in stages for layer in stage.layers] == list(range(8))
    chosen = [layer for stage in stages for layer in stage.topk_layers]
    assert chosen == list(shape.topk.layers)


def test_biases_gpts_activation_and_learned_positions_are_counted_too() -> None:
    text = (
        "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 16 --vocab-size 300 "
        "--max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 8 --topk-layers 0"
    )
    flags = text.split()
    (stage,) = dry_run([*flags, *TRAINING])
    assert stage.parameters == shape_of(flags).parameters
    dry_run([*flags, *TRAINING, *MANY_RANKS])


def test_process_is_left_as_it_was() -> None:
    prepare_device()  # which every command of the process does, for good
    before = dict(os.environ)
    dry_run([*SMALL, *TRAINING])
    assert dict(os.environ) == before


def test_stage_that_is_not_as_planned_is_named() -> None:
    flags = [*SMALL, *TRAINING]
    shape, layout = shape_of(flags), layout_in(flags)
    (stage,) = dry_run(flags)
    check_stage(shape, layout, stage)
    wider = replace(shape, ffn=shape.ffn * 2)
    with pytest.raises(ConfigError, match=r"mlp\.linear_fc1\.weight is \(256, 64\), the plan has"):
        check_stage(wider, layout, stage)
    with pytest.raises(ConfigError, match="TopK layers is"):
        check_stage(shape, layout, replace(stage, topk_layers=(0,)))
    lacking = {name: size for name, size in stage.shapes.items() if "layers.3.mlp" not in name}
    with pytest.raises(ConfigError, match=r"layers\.3\.mlp\.linear_fc1\.weight is None"):
        check_stage(shape, layout, replace(stage, shapes=lacking))
    assert "6 of 8" in stage_table([stage])


def test_parameter_that_is_split_the_wrong_way_is_named() -> None:
    parameter = SimpleNamespace(tensor_model_parallel=True, partition_dim=0)
    check_shard("decoder.layers.0.mlp.linear_fc1.weight", parameter)
    with pytest.raises(
        ConfigError, match=r"linear_fc2\.weight is split .* dimension 0, expected 1"
    ):
        check_shard("decoder.layers.0.mlp.linear_fc2.weight", parameter)
    with pytest.raises(ConfigError, match="dimension None, expected 0"):
        check_shard("output_layer.weight", SimpleNamespace())


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--tensor-model-parallel-size", "2"], "with --sequence-parallel; add the flag"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--topk-sparse-p2p"], "--topk-sparse-p2p needs --pipeline-model-parallel-size above 1"),
        (["--micro-batch-size", "3"], "Megatron refuses these arguments"),
    ],
)
def test_what_a_training_run_refuses_a_dry_run_refuses(flags: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        dry_run([*SMALL, *TRAINING, *flags])
