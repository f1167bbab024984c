"""The emulators' warps and memory do what PTX says, and they report what a kernel does wrong."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from machine_code import Toolchain
from snippets import THREADS, Compile, module


def test_warp_operations_equal_their_definitions(compiled: Compile, tmp_path: Path) -> None:
    runner = compiled({
        "up": "shfl.sync.up.b32 %d, %a, 3, 0, -1;",
        "down": "shfl.sync.down.b32 %d, %a, 5, 31, -1;",
        "bfly": "shfl.sync.bfly.b32 %d, %a, 9, 31, -1;",
        "idx": "shfl.sync.idx.b32 %d, %a, %b, 31, -1;",
        "add": "redux.sync.add.u32 %d, %a, -1;",
        "min": "redux.sync.min.s32 %d, %a, -1;",
        "ballot": "setp.gt.s32 %p, %a, 0; vote.sync.ballot.b32 %d, %p, -1;",
        "match": "and.b32 %a, %a, 3; match.any.sync.b32 %d, %a, -1;",
    })  # fmt: skip
    words = np.random.default_rng(3).integers(0, 2**32, (THREADS, 3), dtype=np.uint32)
    a, b = (words[:, i].reshape(-1, 32) for i in range(2))
    lane = np.arange(32)
    bits = (1 << lane).astype(np.uint64)
    low = a & 3
    expected = {
        "up": a[:, np.where(lane >= 3, lane - 3, lane)],
        "down": a[:, np.where(lane + 5 < 32, lane + 5, lane)],
        "bfly": a[:, lane ^ 9],
        "idx": np.take_along_axis(a, (b & 31).astype(np.int64), axis=1),
        "add": a.sum(1, keepdims=True) + 0 * a,
        "min": a.astype(np.int32).min(1, keepdims=True).astype(np.uint32) | 0 * a,
        "ballot": ((a.astype(np.int32) > 0) * bits).sum(1, keepdims=True) + 0 * a,
        "match": ((low[:, :, None] == low[:, None, :]) * bits).sum(2),
    }
    for name, values in expected.items():
        got = runner.run(name, words, tmp_path)
        assert np.array_equal(got, (values & 0xFFFFFFFF).astype(np.uint32).ravel()), name


SHARED = ".shared .align 16 .b8 space[1024];\n"
STORE_NEIGHBOUR = """
  mov.u32 %t0, space;
  shl.b32 %t1, %thread, 2;
  add.u32 %t2, %t0, %t1;
  st.shared.b32 [%t2], %a;
  {between}
  xor.b32 %t1, %t1, 256;
  add.u32 %t2, %t0, %t1;
  ld.shared.b32 %d, [%t2];
"""
COPY = """
  mov.u32 %t0, space;
  shl.b32 %t1, %thread, 2;
  add.u32 %t0, %t0, %t1;
  cp.async.ca.shared.global [%t0], [%offset], 4;
  cp.async.commit_group;
  {wait}
  ld.shared.b32 %d, [%t0];
"""


def counting_words() -> np.ndarray:
    return np.arange(3 * THREADS, dtype=np.uint32).reshape(THREADS, 3)


@pytest.mark.parametrize("barrier", ["bar.sync 0;", "bar.sync 3, 128;", "barrier.sync.aligned 1;"])
def test_a_barrier_orders_shared_memory(compiled: Compile, barrier: str, tmp_path: Path) -> None:
    runner = compiled({"k": STORE_NEIGHBOUR.format(between=barrier)}, SHARED)
    words = counting_words()
    got = runner.run("k", words, tmp_path)
    assert np.array_equal(got, words[np.arange(THREADS) ^ 64, 0])


@pytest.mark.parametrize("between", ["", "bar.sync 1, 64;"], ids=["nothing", "half"])
def test_a_missing_barrier_is_reported(
    language: str, compiled: Compile, between: str, tmp_path: Path
) -> None:
    runner = compiled({"k": STORE_NEIGHBOUR.format(between=between)}, SHARED)
    _, result = runner.try_run("k", counting_words(), tmp_path)
    assert "shared race" in result.stderr or "has not written" in result.stderr


def test_an_asynchronous_copy_arrives_when_it_is_waited_for(
    compiled: Compile, tmp_path: Path
) -> None:
    runner = compiled({"k": COPY.format(wait="cp.async.wait_group 0;")}, SHARED)
    words = counting_words()
    assert np.array_equal(runner.run("k", words, tmp_path), words[:, 0])


def test_a_missing_wait_is_reported(compiled: Compile, tmp_path: Path) -> None:
    runner = compiled({"k": COPY.format(wait="cp.async.wait_group 1;")}, SHARED)
    _, result = runner.try_run("k", counting_words(), tmp_path)
    assert "still copies" in result.stderr


def test_an_access_out_of_bounds_stops(compiled: Compile, tmp_path: Path) -> None:
    runner = compiled({"k": "ld.global.b32 %d, [%out+65536];"})
    _, result = runner.try_run("k", counting_words(), tmp_path)
    assert result.returncode == 98
    assert "out of bounds" in result.stderr


@pytest.mark.parametrize(
    "body", ["tex.1d.v4.f32.s32 {%t0}, [x, {%a}];", "add.sideways.u32 %d, %a, %b;"]
)
def test_what_the_ptx_emulator_does_not_know_stops_it_with_its_text(
    toolchain: Toolchain, body: str, tmp_path: Path
) -> None:
    ptx = tmp_path / "unknown.ptx"
    ptx.write_text(module({"k": body}))
    command = [str(toolchain.snippet_driver("ptx")), str(ptx)]
    result = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert result.returncode == 98
    assert "not supported" in result.stderr
    assert body.rstrip(";") in result.stderr
