"""Tests that we know all arguments of the installed Megatron, and hide none that shapes a model."""

import json
import subprocess
import sys
from fnmatch import fnmatchcase

import pytest

from tests.harness.launch import REPOSITORY
from topk_megatron.checkpoint import flags
from topk_megatron.checkpoint.flags import is_recorded, shapes_the_model
from topk_megatron.hf.flag_mapping import COMPUTED, DIRECT, REFUSED

_LIST_NAMES = """
import json, sys
sys.argv = ["x"]
from dataclasses import fields
from topk_megatron.compat import prepare_device
device = prepare_device()
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.training.arguments import parse_args
from topk_megatron.train.arguments import arguments_provider
layout = {field.name for field in fields(ModelParallelConfig)}
model = {field.name for field in fields(MLATransformerConfig)} - layout
arguments = list(vars(parse_args(arguments_provider(device))))
print("NAMES", json.dumps({"arguments": arguments, "model": sorted(model)}))
"""
# Old spellings that Megatron removes when it validates its arguments.
REMOVED = {
    "batch_size",
    "checkpoint_activations",
    "warmup",
}
MAPPED = (*DIRECT, *COMPUTED, *REFUSED)
WORDS = flags._TABLES
FAMILIES = [word for words in WORDS.values() for word in words if "*" in word]
# Families that match fields of Megatron's model configuration. The fields set how the model is
# executed, or belong to parts that a plain GPT does not have. Add a family only if no field that it
# could match changes what a trained model computes.
OF_THE_CONFIGURATION = {
    *("*_backend", "*_dispatcher_*", "*cuda_graph*", "*deepep*", "*grouped_gemm*", "*hybridep*"),
    *("*ncclep*", "*offload*", "*overlap*", "*pipeline*", "*wgrad*", "*_interval", "inference_*"),
    *("log_*", "moe_paged_stash*", "moe_router_padding_for_*", "nccl_*", "recompute_*"),
    *("dsa_*", "fp4_*", "fp8_*", "mamba_*", "mup_*"),
}


@pytest.fixture(scope="module")
def names() -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", _LIST_NAMES],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
        check=True,
    )
    line = next(ln for ln in done.stdout.splitlines() if ln.startswith("NAMES"))
    return json.loads(line.removeprefix("NAMES"))


def test_every_argument_of_the_training_script_is_mapped_refused_or_known_to_have_no_effect(
    names: dict[str, list[str]],
) -> None:
    shaping = {name for name in names["arguments"] if shapes_the_model(name)}
    assert shaping - set(MAPPED) == REMOVED


def test_no_table_says_that_a_mapped_or_refused_argument_has_no_effect() -> None:
    assert [name for name in MAPPED if not shapes_the_model(name)] == []
    words = [*MAPPED, *(word for table in WORDS.values() for word in table)]
    assert len(words) == len(set(words))


def test_a_field_of_the_model_configuration_is_known_by_its_whole_name(
    names: dict[str, list[str]],
) -> None:
    whole = {word for words in WORDS.values() for word in words} | set(MAPPED)
    for name in sorted(set(names["model"]) - whole):
        caught = {family for family in FAMILIES if fnmatchcase(name, family)}
        assert caught <= OF_THE_CONFIGURATION, name


@pytest.mark.parametrize("name", ["new_flag", "attention_new", "moe_new", "rotary_new", "mtp_new"])
def test_an_argument_of_a_newer_megatron_may_shape_the_model_and_is_recorded(name: str) -> None:
    assert shapes_the_model(name)
    assert is_recorded(name)


@pytest.mark.parametrize(("name", "recorded"), [("lr", True), ("load", False), ("rl_new", False)])
def test_training_is_recorded_and_its_machine_is_not(name: str, recorded: bool) -> None:
    assert not shapes_the_model(name)
    assert is_recorded(name) == recorded
