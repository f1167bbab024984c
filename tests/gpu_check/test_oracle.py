"""The oracle of the GPU check agrees with the definition and notices a wrong bit, on the CPU."""

import pytest
import torch

from tests.gpu import oracle
from tests.rows import KINDS, MODES, make_rows

WIDTHS = (7, 64, 333)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_and_operator_agree_on_the_cpu(kind: str, mode: str) -> None:
    found = oracle.Found()
    for dtype in oracle.DTYPES:
        for width in WIDTHS:
            x = make_rows(kind, (5, width), dtype)
            oracle.compare_batch(found, x, mode, [1, width // 2, width], f"{kind} {dtype}")
    assert found.differences == []
    assert found.rows == 5 * 3 * len(WIDTHS) * len(oracle.DTYPES)


@pytest.mark.parametrize("fault", ["y", "bits", "gradient", "tail"])
def test_oracle_notices_one_wrong_bit(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(x: torch.Tensor, k: int, *, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
        y, bits = select(x, k, mode=mode)
        if fault == "y":
            y.view(torch.int32)[3, 5] ^= 1
        if fault == "bits":
            bits[2, 0] ^= 1
        if fault == "tail":
            bits[2, -1] |= 1 << 20
        return y, bits

    def faulty_gradient(dy: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        dx = backward(dy, bits)
        if fault == "gradient":
            dx.view(torch.int32)[0, -1] ^= 1
        return dx

    class Ops:
        topk_mask_backward = staticmethod(faulty_gradient)

    select, backward = oracle.topk_mask_with_bits, oracle.OPS.topk_mask_backward
    monkeypatch.setattr(oracle, "topk_mask_with_bits", faulty)
    monkeypatch.setattr(oracle, "OPS", Ops)
    monkeypatch.setattr(oracle, "pack_sparse", lambda y, bits, k: (y, bits))
    monkeypatch.setattr(oracle, "unpack_sparse", lambda y, bits, hidden_size: y)
    found = oracle.Found()
    x = make_rows("normal", (5, 333), torch.float32)
    oracle.compare_batch(found, x, "value", [16], "here")
    assert found.differences


def test_oracle_stops_when_time_is_up_and_says_how_far_it_came() -> None:
    found = oracle.run("cpu", seconds=0.5, rows=(1, 1))
    assert 0 < sum(found.rounds) < 2 * len(list(oracle.combinations()))
    assert found.cases > 0


def test_combinations_are_those_of_the_kernels() -> None:
    widths = {width for width, *_ in oracle.combinations()}
    assert {1024, 2048, 4096, 8192, 16384} <= widths
    assert any(width % 8 for width in widths)
    assert len(list(oracle.combinations())) == (
        len(oracle.WIDTHS) * len(oracle.DTYPES) * len(MODES) * len(KINDS)
    )
