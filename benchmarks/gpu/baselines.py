"""What else selects k of every row: each baseline, what it does, and why it is absent if it is.

`find` tries each one on a few rows. Where it promises what the operator does (x at the k largest
coordinates and +0 elsewhere), the two are compared on rows without ties, which have one such y. A
baseline that does another job says so in `job`, and its time does not compare directly.

Shape suffixes: R rows, H hidden size, K selected.
"""

import ctypes
import importlib
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topk_megatron.ops import topk_mask

Function = Callable[[Tensor, int], Any]
HERE = Path(__file__).parent
LIBRARY = "TOPK_CCCL_LIBRARY"  # path of a built cccl_topk.cu
HEADERS = "TOPK_CCCL_INCLUDE"  # folder of CCCL's headers, newer than the toolkit's


SAME = "y"  # a job that begins so


class Absent(Exception):
    """This baseline cannot run here; the message says why."""


@dataclass(frozen=True)
class Baseline:
    """A function to compare with.

    Attributes:
        name: what the table calls it.
        job: what it writes, where the operator writes y and a bitmask.
        load: returns the function for [R, H] rows and k, or raises `Absent`.
    """

    name: str
    job: str
    load: Callable[[], Function]

    @property
    def comparable(self) -> bool:
        """Whether it writes the operator's y, at least in rows without ties."""
        return self.job.startswith(SAME)


def topk_scatter(x_RH: Tensor, k: int) -> Tensor:
    """Do what a model does without the operator."""
    values_RK, indices_RK = torch.topk(x_RH, k, dim=-1, sorted=False)
    return torch.zeros_like(x_RH).scatter_(-1, indices_RK, values_RK)


def topk_scatter_mask(x_RH: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Do so and also keep a boolean mask for the backward pass."""
    indices_RK = torch.topk(x_RH, k, dim=-1, sorted=False).indices
    mask_RH = torch.zeros_like(x_RH, dtype=torch.bool).scatter_(-1, indices_RK, True)
    return torch.where(mask_RH, x_RH, 0), mask_RH


def kthvalue_where(x_RH: Tensor, k: int) -> Tensor:
    """Mask by the k-th value; this keeps more than k where values tie."""
    threshold_R1 = torch.kthvalue(x_RH, x_RH.shape[-1] - k + 1, dim=-1, keepdim=True).values
    return torch.where(x_RH >= threshold_R1, x_RH, 0)


def _compiled() -> Function:
    compiled = torch.compile(topk_scatter, dynamic=False)
    return lambda x_RH, k: compiled(x_RH, k)


def _import(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as problem:  # compiled packages fail in many ways
        raise Absent(f"{type(problem).__name__}: {' '.join(str(problem).split())}") from None


def _transformer_engine() -> Function:
    fused = _import("transformer_engine.pytorch.router", "fused_topk_with_score_function")

    def forward(x_RH: Tensor, k: int) -> Any:
        if x_RH.shape[-1] > 2304:
            raise Absent("the router's kernel takes rows of up to 2,304 scores")
        formats = {"routing_map_format": "bitmap_u8"}
        return fused(x_RH, k, False, None, None, None, "sigmoid", None, **formats)

    return forward


def _cccl_library() -> Any:
    """Load cccl_topk.cu's library, building it where the toolkit has CCCL's batched top-k."""
    built = os.environ.get(LIBRARY)
    if built:
        return ctypes.CDLL(built)
    target = Path(os.environ.get("TMPDIR", "/tmp")) / f"libcccl_topk.{os.getpid()}.so"
    where = [f"-I{os.environ[HEADERS]}"] if HEADERS in os.environ else []
    command = ["nvcc", "-std=c++17", "-O3", "-arch=native", "-Xcompiler=-fPIC", "-shared", *where]
    command += [str(HERE / "cccl_topk.cu"), "-o", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as problem:
        raise Absent(f"nvcc cannot be run: {problem}") from None
    if done.returncode != 0:
        first = next((x for x in done.stderr.splitlines() if "error" in x), "nvcc failed")
        raise Absent(f"cccl_topk.cu does not build with this toolkit: {first}")
    return ctypes.CDLL(str(target))


def _cccl() -> Function:
    run = _cccl_library().cccl_topk
    workspaces: dict[tuple[Any, ...], Tensor] = {}

    def pairs(x_RH: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values_RK = x_RH.new_empty((len(x_RH), k))
        indices_RK = torch.empty((len(x_RH), k), dtype=torch.int32, device=x_RH.device)
        size = ctypes.c_size_t()

        def call(workspace: int | None) -> None:
            tensors = [ctypes.c_void_p(x.data_ptr()) for x in (x_RH, values_RK, indices_RK)]
            numbers = [ctypes.c_int64(n) for n in (*x_RH.shape, k)]
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            is_bfloat16 = ctypes.c_int(x_RH.dtype == torch.bfloat16)
            space = ctypes.c_void_p(workspace)
            error = run(space, ctypes.byref(size), *tensors, *numbers, is_bfloat16, stream)
            if error:
                raise Absent(f"cudaError {error} for H = {x_RH.shape[-1]}, k = {k}")

        key = (*x_RH.shape, x_RH.dtype, k)
        if key not in workspaces:
            call(None)
            workspaces[key] = torch.empty(max(size.value, 1), dtype=torch.uint8, device=x_RH.device)
        size.value = workspaces[key].numel()
        call(workspaces[key].data_ptr())
        return values_RK, indices_RK

    return pairs


def _cccl_scatter() -> Function:
    pairs = _cccl()

    def scattered(x_RH: Tensor, k: int) -> Tensor:
        values_RK, indices_RK = pairs(x_RH, k)
        return torch.zeros_like(x_RH).scatter_(-1, indices_RK.long(), values_RK)

    return scattered


def _rtopk() -> Function:
    select = _import("rtopk", "rtopk")
    return lambda x_RH, k: select(x_RH, k)


def _flashinfer() -> Function:
    select = _import("flashinfer", "top_k")
    return lambda x_RH, k: select(x_RH, k)


_PAIRS = "k values and indices, unordered"
BASELINES = (
    Baseline("torch.topk + scatter", SAME, lambda: topk_scatter),
    Baseline(
        "torch.topk + scatter of a mask", f"{SAME} and a bool mask", lambda: topk_scatter_mask
    ),
    Baseline("torch.compile of topk + scatter", SAME, _compiled),
    Baseline("kthvalue + where", f"{SAME} (more than k where values tie)", lambda: kthvalue_where),
    Baseline("CCCL DeviceBatchedTopK + scatter", SAME, _cccl_scatter),
    Baseline("CCCL DeviceBatchedTopK", _PAIRS, _cccl),
    Baseline(
        "Transformer Engine fused_topk_with_score_function",
        "sigmoid scores of the k largest, normalised, and a bitmap",
        _transformer_engine,
    ),
    Baseline("RTop-K", _PAIRS, _rtopk),
    Baseline("FlashInfer top_k", _PAIRS, _flashinfer),
)


def distinct_rows(rows: int, hidden_size: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return rows [R, H] in which no two values tie, as far as the dtype has that many values."""
    order_RH = torch.rand((rows, hidden_size), device=device).argsort(dim=-1)
    if dtype == torch.float32:
        return order_RH.float() - hidden_size // 2
    bits_RH = order_RH.to(torch.int16) + 0x3000  # consecutive positive 16-bit floats
    return bits_RH.view(dtype)


def check(baseline: Baseline, function: Function, x_RH: Tensor, k: int) -> str:
    """Return how the baseline's y compares with the operator's on rows without ties.

    Raises:
        Absent: the baseline refuses these rows.
    """
    try:
        result = function(x_RH, k)
        if x_RH.is_cuda:
            torch.cuda.synchronize()
    except Absent:
        raise
    except Exception as problem:
        raise Absent(f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}") from None
    if not baseline.comparable:
        return "another job, not compared"
    y_RH = result[0] if isinstance(result, tuple) else result
    if not torch.equal(y_RH, topk_mask(x_RH, k)):
        raise Absent("its y differs from the operator's on rows without ties")
    return "equal on rows without ties"


def find(x_RH: Tensor, k: int) -> tuple[dict[str, Function], dict[str, str]]:
    """Return the baselines that work for rows like these, and a remark on every baseline."""
    functions: dict[str, Function] = {}
    remarks: dict[str, str] = {}
    for baseline in BASELINES:
        try:
            function = baseline.load()
            remarks[baseline.name] = check(baseline, function, x_RH, k)
            functions[baseline.name] = function
        except Absent as reason:
            remarks[baseline.name] = f"absent: {reason}"
    return functions, remarks
