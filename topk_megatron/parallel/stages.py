"""Which message comes when: the order in which a pipeline rank sends and receives.

Megatron's communicator is told to send and receive tensors, never of which model chunk. The order
is that of its schedule: forward messages leave a rank in the order in which it runs its
(microbatch, chunk) pairs, gradients in the order of its backward passes, and a link keeps the
order. The n-th message of a direction in one step is therefore known to both of its sides.

A boundary is named by the chunk that sends across it in the forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.pipeline_parallel.schedules import get_schedule_table


@dataclass(frozen=True)
class MessageOrder:
    """Boundaries crossed by one rank's messages in one step, in order.

    Attributes:
        forward_out: boundary of each hidden state that goes to the next rank.
        forward_in: boundary of each hidden state that comes from the previous rank.
        backward_out: boundary of each gradient that goes to the previous rank.
        backward_in: boundary of each gradient that comes from the next rank.
    """

    forward_out: Sequence[int]
    forward_in: Sequence[int]
    backward_out: Sequence[int]
    backward_in: Sequence[int]


def message_order(
    *, rank: int, size: int, chunks: int, microbatches: int, group_size: int | None
) -> MessageOrder:
    """The order of one training step.

    Args:
        rank: place in the pipeline.
        size: ranks of the pipeline.
        chunks: model chunks of a rank; 1 without interleaving.
        microbatches: of the step.
        group_size: Megatron's ``microbatch_group_size_per_vp_stage``.
    """
    if chunks == 1:
        forward = [0] * microbatches
    else:
        table = get_schedule_table(microbatches, chunks, group_size)
        forward = [chunk for _, chunk in table]
    backward = [chunks - 1 - chunk for chunk in forward]
    return MessageOrder(
        forward_out=_leaving(forward, rank, size, chunks),
        forward_in=_leaving(forward, (rank - 1) % size, size, chunks),
        backward_out=_returning(backward, rank),
        backward_in=_returning(backward, (rank + 1) % size),
    )


def _leaving(forward: list[int], sender: int, size: int, chunks: int) -> list[int]:
    """Chunks of `sender` whose output goes on; that of the model's last chunk does not."""
    last = sender == size - 1
    return [chunk for chunk in forward if not (last and chunk == chunks - 1)]


def _returning(backward: list[int], sender: int) -> list[int]:
    """Boundaries over which `sender`'s gradients go back; the model's first chunk has none.

    The input of rank 0's chunk c came from chunk c - 1 of the last rank.
    """
    if sender == 0:
        return [chunk - 1 for chunk in backward if chunk > 0]
    return backward
