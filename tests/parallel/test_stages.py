"""The order of messages, checked from both sides of every link and against Megatron's table."""

from hypothesis import given
from hypothesis import strategies as st

from topk_megatron.parallel.stages import MessageOrder, message_order


def orders(size: int, chunks: int, microbatches: int, group: int) -> list[MessageOrder]:
    return [
        message_order(
            rank=rank, size=size, chunks=chunks, microbatches=microbatches, group_size=group
        )
        for rank in range(size)
    ]


@given(size=st.integers(2, 5), chunks=st.integers(1, 4), groups=st.integers(1, 3))
def test_every_stage_passes_every_microbatch_on_and_back_once(
    size: int, chunks: int, groups: int
) -> None:
    microbatches = size * groups
    ranks = orders(size, chunks, microbatches, size)
    for rank, order in enumerate(ranks):
        following = ranks[(rank + 1) % size]
        assert list(following.forward_in) == list(order.forward_out)
        assert list(following.backward_out) == list(order.backward_in)
        # The model's last stage sends no hidden state.
        sending = [c for c in range(chunks) if not (rank == size - 1 and c == chunks - 1)]
        expected = sorted(sending * microbatches)
        assert sorted(order.forward_out) == sorted(order.backward_in) == expected


def test_interleaved_order_follows_megatrons_table() -> None:
    # Megatron's own example (schedules.py): PP2, 5 microbatches in groups of 3, 2 chunks.
    first, second = orders(2, 2, 5, 3)
    assert list(first.forward_out) == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    assert list(second.forward_out) == [0] * 5  # its chunk 1 is the model's last stage
    assert list(second.backward_out) == [1, 1, 1, 0, 0, 0, 1, 1, 0, 0]
    # Rank 0's chunk 1 got its input from chunk 0 of rank 1, and its chunk 0 from nobody.
    assert list(first.backward_out) == [0] * 5
