"""Cutting Megatron's tensors, against loops that follow Megatron's layout row by row."""

import pytest
import torch

from topk_megatron.hf.pieces import SPLITS

CONFIG = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 10}


def test_queries_keys_and_values_are_found_group_by_group() -> None:
    qkv = torch.arange((6 + 2 + 2) * 4 * 3).view(40, 3)
    queries, keys, values = [], [], []
    row = 0
    for _group in range(2):
        for kind, heads in ((queries, 3), (keys, 1), (values, 1)):
            for _ in range(heads * 4):
                kind.append(qkv[row])
                row += 1
    parts = SPLITS["qkv"].cut(qkv, CONFIG)
    for part, expected in zip(parts, (queries, keys, values), strict=True):
        assert torch.equal(part, torch.stack(expected))


def test_the_first_half_of_a_gated_mlp_is_its_gate() -> None:
    fc1 = torch.arange(12).view(6, 2)
    gate, up = SPLITS["gate and up"].cut(fc1, CONFIG)
    assert torch.equal(gate, fc1[:3])
    assert torch.equal(up, fc1[3:])


@pytest.mark.parametrize("split", sorted(SPLITS))
@pytest.mark.parametrize("rest", [(3,), ()], ids=["weight", "bias"])
def test_joining_undoes_cutting_bitwise_and_shapes_are_foretold(
    split: str, rest: tuple[int, ...]
) -> None:
    rows = 10 if split == "vocabulary" else 40
    tensor = torch.randn(rows, *rest)
    parts = SPLITS[split].cut(tensor, CONFIG)
    assert tuple(tuple(p.shape) for p in parts) == SPLITS[split].shapes(tensor.shape, CONFIG)
    assert torch.equal(SPLITS[split].join(parts, CONFIG), tensor)


def test_padding_of_the_vocabulary_is_cut_off() -> None:
    (kept,) = SPLITS["vocabulary"].cut(torch.arange(32).view(16, 2), CONFIG)
    assert torch.equal(kept, torch.arange(20).view(10, 2))
