"""The order in which a pipeline rank sends and receives its messages.

Megatron tells its communicator which tensors to send and receive, but not which model chunk they
belong to. The order follows from its schedule: forward messages leave a rank in the order in which
it runs its (microbatch, chunk) pairs, gradients in the order of its backward passes, and a link
keeps the order. Both sides therefore know the n-th message of a step in each direction.

A boundary has the number of the chunk that sends across it in the forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.pipeline_parallel.schedules import get_schedule_table


@dataclass(frozen=True)
class MessageOrder:
    """Boundaries crossed by one rank's messages in one step, in order.

    Attributes:
        forward_out: boundary of each hidden state sent to the next rank.
        forward_in: boundary of each hidden state received from the previous rank.
        backward_out: boundary of each gradient sent to the previous rank.
        backward_in: boundary of each gradient received from the next rank.
    """

    forward_out: Sequence[int]
    forward_in: Sequence[int]
    backward_out: Sequence[int]
    backward_in: Sequence[int]


def message_order(
    *, rank: int, size: int, chunks: int, microbatches: int, group_size: int | None
) -> MessageOrder:
    """Return the order of one training step.

    Args:
        rank: this rank's place in the pipeline.
        size: number of ranks in the pipeline.
        chunks: number of model chunks per rank; 1 without interleaving.
        microbatches: number of microbatches in the step.
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
    """Return the chunks of `sender` that send their output: all but the model's last chunk."""
    last = sender == size - 1
    return [chunk for chunk in forward if not (last and chunk == chunks - 1)]


def _returning(backward: list[int], sender: int) -> list[int]:
    """Return the boundaries that `sender`'s gradients cross; the model's first chunk has none.

    The input of rank 0's chunk c came from chunk c - 1 of the last rank.
    """
    if sender == 0:
        return [chunk - 1 for chunk in backward if chunk > 0]
    return backward
