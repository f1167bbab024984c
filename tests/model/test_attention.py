"""Our core attention computes what Megatron's own does, forward and backward, in less memory."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness.attention import both, causal, prepare_megatron, qkv, result, seed

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="Megatron's class keeps its buffers on the CUDA device; tests/gpu compares there",
)

FLASH = "aten._scaled_dot_product_flash_attention_for_cpu.default"
FLASH_BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> Iterator[None]:
    prepare_megatron()
    yield
    from megatron.core import parallel_state

    parallel_state.destroy_global_memory_buffer()


def same(got: list[Tensor], wanted: list[Tensor], dtype: torch.dtype = torch.float64) -> None:
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}[dtype]
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def compare(ours: Any, theirs: Any, inputs: list[Tensor], mask: Tensor | None) -> None:
    """Check that output and gradients are the same."""
    got, wanted = (result(lambda m=m: m(*inputs, mask), inputs) for m in (ours, theirs))
    same(got, wanted)


@settings(max_examples=60)
@given(
    length=st.integers(1, 70),
    batch=st.integers(1, 3),
    shared=st.sampled_from([(4, 4), (4, 2), (6, 1), (1, 1)]),
    size=st.sampled_from([1, 7, 16, 64]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([None, 0.5]),
    scaled=st.booleans(),
)
def test_a_causal_mask_and_shared_heads(
    length: int,
    batch: int,
    shared: tuple[int, int],
    size: int,
    dtype: torch.dtype,
    scale: float | None,
    scaled: bool,
) -> None:
    heads, groups = shared
    theirs, ours = both(
        *(heads, groups, size, 3), softmax_scale=scale, apply_query_key_layer_scaling=scaled
    )
    x = qkv(length, batch, heads, groups, size, dtype)
    got, wanted = (result(lambda m=m: m(*x, None), x) for m in (ours, theirs))
    same(got, wanted, dtype)
    assert got[0].shape == (length, batch, heads * size)
    assert got[0].is_contiguous()


@settings(max_examples=40)
@given(
    length=st.integers(1, 33),
    kind=st.sampled_from(["causal", "padding", "arbitrary", "padding_causal", "no_mask"]),
    groups=st.sampled_from([4, 2, 1]),
    shape=st.sampled_from([(2, 4), (2, 1), (1, 4), (1, 1)]),
    density=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
)
def test_a_mask_is_followed_also_where_it_hides_every_key(
    length: int, kind: str, groups: int, shape: tuple[int, int], density: float
) -> None:
    theirs, ours = both(groups=groups, kind=kind)
    x = qkv(length, groups=groups)
    mask = torch.rand(*shape, length, length) < density
    compare(ours, theirs, x, mask)


@pytest.mark.parametrize("kind", ["padding", "arbitrary", "no_mask"])
def test_without_a_mask_other_layers_see_every_key(kind: str) -> None:
    theirs, ours = both(kind=kind)
    x = qkv(9)
    compare(ours, theirs, x, None)


def test_queries_and_keys_of_different_lengths() -> None:
    theirs, ours = both(kind="padding")
    query, key, value = qkv(5)[:1] + qkv(11)[1:]
    mask = torch.rand(2, 1, 5, 11) < 0.5
    x = [query, key, value]
    compare(ours, theirs, x, mask)


@settings(max_examples=20)
@given(length=st.integers(1, 40), window=st.integers(0, 12), ahead=st.integers(0, 2))
def test_a_sliding_window(length: int, window: int, ahead: int) -> None:
    theirs, ours = both(window_size=(window, ahead), groups=2)
    x = qkv(length, groups=2)
    compare(ours, theirs, x, None)


def test_layers_without_the_window_are_causal() -> None:
    _, windowed = both(window_size=(2, 0), window_attn_skip_freq=2, layer=1)
    theirs, ours = both(window_size=(2, 0), window_attn_skip_freq=2, layer=2)
    assert windowed.window == (2, 0)
    assert ours.window is None
    x = qkv(16)
    compare(ours, theirs, x, None)


def test_a_window_and_a_mask_both_hold() -> None:
    """Megatron's class drops the mask, so that tokens see other documents."""
    _, windowed = both(window_size=(3, 0))
    _, plain = both()
    x = qkv(12)
    documents = causal(12)
    documents[..., 6:, :6] = True
    far = ~torch.ones(12, 12, dtype=torch.bool).triu(-3)
    same(
        result(lambda: windowed(*x, documents), x),
        result(lambda: plain(*x, documents | far), x),
    )


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("groups", [4, 2])
def test_dropout_draws_what_megatron_draws_from_the_same_generator(
    groups: int, sequence_parallel: bool
) -> None:
    settings: dict[str, Any] = {"attention_dropout": 0.3, "groups": groups}
    theirs, ours = both(**settings, sequence_parallel=sequence_parallel)
    x = qkv(24, groups=groups)
    outputs, states = [], []
    for module in (ours, theirs):
        seed(1)
        outputs.append(result(lambda m=module: m(*x, None), x))
        states.append(torch.get_rng_state())
    same(outputs[0], outputs[1])
    assert torch.equal(*states)
    torch.manual_seed(1)
    assert torch.equal(states[0], torch.get_rng_state()) == (not sequence_parallel)
    seed(2)
    assert not torch.allclose(ours(*x, None), outputs[0][0])


def test_evaluation_drops_nothing() -> None:
    _, plain = both()
    _, ours = both(attention_dropout=0.3)
    x = qkv(16)
    assert torch.equal(ours.eval()(*x, None), plain(*x, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_errors_stay_below_the_rounding_of_one_number(
    dtype: torch.dtype,
) -> None:
    ours = both(size=64, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)[1]
    x = qkv(128, size=64, dtype=dtype)
    doubles = [part.detach().double().requires_grad_() for part in x]
    exact = result(lambda: both(size=64)[1](*doubles, None), doubles)
    for half, wanted in zip(result(lambda: ours(*x, None), x), exact, strict=True):
        assert float((half - wanted).norm() / wanted.norm()) < torch.finfo(dtype).eps


@pytest.mark.parametrize("groups", [4, 1])
def test_one_query_sees_the_whole_cache(groups: int) -> None:
    theirs, ours = both(groups=groups)
    query, key, value = qkv(10, groups=groups)
    whole = ours(query, key, value, None)
    with torch.no_grad():
        last = ours(query[-1:], key, value, None)
        torch.testing.assert_close(last, whole[-1:])
        torch.testing.assert_close(theirs(query[-1:], key, value, None), last)
    with pytest.raises(AssertionError, match="causal mask"):
        ours(query[-2:], key, value, None)


class TestPackedSequences:
    LENGTHS = (3, 0, 7, 1)

    def packed(self, padding: int = 0) -> Any:
        from megatron.core.packed_seq_params import PackedSeqParams

        sums = torch.tensor([0, *self.LENGTHS], dtype=torch.int32).cumsum(0)
        padded = sums + padding * torch.arange(len(sums)) if padding else None
        edges: Any = {"cu_seqlens_q": sums, "cu_seqlens_kv": sums}
        more: Any = {"cu_seqlens_q_padded": padded, "cu_seqlens_kv_padded": padded}
        return PackedSeqParams(qkv_format="thd", **edges, **more)

    @pytest.mark.parametrize("groups", [4, 2])
    @pytest.mark.parametrize("padding", [0, 2])
    @pytest.mark.parametrize("more", [{}, {"window_size": (2, 0)}], ids=["causal", "window"])
    def test_each_is_attended_to_alone(
        self, padding: int, groups: int, more: dict[str, Any]
    ) -> None:
        theirs, ours = both(groups=groups, **more)
        params, tail = self.packed(padding), 3
        total = sum(self.LENGTHS) + padding * len(self.LENGTHS) + tail
        x = [part.squeeze(1).detach().requires_grad_() for part in qkv(total, 1, groups=groups)]

        def one_by_one() -> Tensor:
            output, start = torch.zeros(total, 32, dtype=torch.float64), 0
            for length in self.LENGTHS:
                part = slice(start, start + length)
                if length:
                    output[part] = theirs(*(t[part].unsqueeze(1) for t in x), None)[:, 0]
                start += length + padding
            return output

        got = result(lambda: ours(*x, None, packed_seq_params=params), x)
        assert got[0].shape == (total, 32)
        same(got, result(one_by_one, x))

    def test_megatrons_class_refuses_them(self) -> None:
        theirs, _ = both()
        with pytest.raises(AssertionError, match="not supported by DotProductAttention"):
            theirs(*qkv(11), None, packed_seq_params=self.packed())


class Watched(TorchDispatchMode):
    """Records the operators that run, and the largest tensor that one of them returns."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.operators.add(str(func))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return made


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_has_an_entry_for_every_pair_of_tokens(dtype: torch.dtype, groups: int) -> None:
    length = 512
    theirs, ours = both(groups=groups, bf16=dtype == torch.bfloat16)
    x = qkv(length, 1, groups=groups, dtype=dtype)
    watched = {}
    for name, module in (("theirs", theirs), ("ours", ours)):
        with Watched() as watched[name]:
            result(lambda m=module: m(*x, None), x)
    assert {FLASH, FLASH_BACKWARD} <= watched["ours"].operators
    assert watched["ours"].largest <= length * 4 * 8
    assert watched["theirs"].largest >= length * length


def peak(module: Any, length: int) -> int:
    """Return the most bytes that forward and backward hold at once, inside kernels too."""
    x = qkv(length, 1, dtype=torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result(lambda: module(*x, None), x)
    events: Any = profiled.profiler.kineto_results.events()  # pyright: ignore
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = list(itertools.accumulate(change for _, change in sorted(changes)))
    return max(held)


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    theirs, ours = both()
    assert peak(ours, 2048) < 2.5 * peak(ours, 1024)
    assert peak(theirs, 2048) > 3.5 * peak(theirs, 1024)
    assert peak(theirs, 2048) > 10 * peak(ours, 2048)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [4, 1])
def test_the_same_bits_on_every_run_and_with_any_number_of_threads(
    groups: int, masked: bool
) -> None:
    """Recomputed layers and resumed runs are bitwise equal only if this holds."""
    _, ours = both(groups=groups, size=16)
    x = qkv(300, 3, groups=groups, size=16, dtype=torch.float32)
    mask = torch.rand(3, 1, 300, 300) < 0.5 if masked else None
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(result(lambda: ours(*x, mask), x))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_context_parallelism_is_refused_as_by_megatrons_class() -> None:
    from topk_megatron.model.attention import FusedAttention

    config: Any = SimpleNamespace(context_parallel_size=2)
    with pytest.raises(AssertionError, match="Context parallelism"):
        FusedAttention(config, 1, None, "self")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"attention_backend": "flash"}, None),
        ({"attention_backend": "fused"}, None),
        ({"attention_backend": "unfused"}, "--attention-backend unfused"),
        ({"attention_backend": "local"}, "--attention-backend local"),
        ({"softmax_type": "learnable"}, "--softmax-type learnable"),
        ({"softmax_type": "off-by-one"}, "--softmax-type off-by-one"),
        ({"multi_latent_attention": True}, "--multi-latent-attention"),
        ({"experimental_attention_variant": "dsa"}, "--experimental-attention-variant"),
        ({"batch_invariant_mode": True}, "--batch-invariant-mode"),
    ],
)
def test_what_calls_for_megatrons_own_is_named(changes: dict[str, Any], reason: str | None) -> None:
    from megatron.core.transformer.enums import AttnBackend

    from topk_megatron.model.attention import why_megatrons_own

    settings = {
        "attention_backend": "auto",
        "softmax_type": "vanilla",
        "multi_latent_attention": False,
        "experimental_attention_variant": None,
        "batch_invariant_mode": False,
        **changes,
    }
    settings["attention_backend"] = AttnBackend[settings["attention_backend"]]
    assert why_megatrons_own(SimpleNamespace(**settings)) == reason
