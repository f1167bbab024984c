"""Sparse transport between pipeline stages: k values of H forward, k gradient entries back.

`SparseP2PCommunicator` is Megatron's `P2PCommunicator` with different message contents. After a
TopK layer the hidden state is zero off S, so its k values and S describe it completely. Of its
gradient, only the entries on S survive the TopK's backward pass. The transport is lossless: losses
and weight gradients are bitwise those of dense transport. At all other boundaries, and while k is
too large to save anything, messages are dense.

`topk_megatron.parallel.wire` defines the messages and `topk_megatron.parallel.stages` their order.
Both sides keep the S of each microbatch in flight until its gradient has passed.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from topk_megatron.errors import TransportError
from topk_megatron.parallel.selection import Selection, SelectionRegistry
from topk_megatron.parallel.stages import MessageOrder, message_order
from topk_megatron.parallel.verify import Verifier
from topk_megatron.parallel.wire import (
    WireFormat,
    pack_gradient,
    pack_hidden,
    unpack_gradient,
    unpack_hidden,
    wire_format,
)


class Arrival:
    """A request that unpacks its message when it is first waited for."""

    def __init__(self, request: Any, peer: str, finish: Callable[[], None] | None) -> None:
        self._request, self._peer, self._finish = request, peer, finish

    def wait(self) -> None:
        """Block until the message is sent, or received and unpacked; may be called again."""
        if self._request is None:
            return
        try:
            self._request.wait()
        except RuntimeError as error:
            raise TransportError(
                f"pipeline rank lost: the transfer with {self._peer} did not finish "
                f"({' '.join(str(error).split())}); see that rank's log for why it ended"
            ) from error
        if self._finish is not None:
            self._finish()
        self._request = self._finish = None


class SparseP2PCommunicator(P2PCommunicator):
    """Sends TopK hidden states and their gradients sparsely, and the rest as Megatron does."""

    def __init__(
        self,
        pp_group: dist.ProcessGroup,
        config: Any,
        *,
        hidden_size: int,
        sparse_out: Sequence[bool],
        selections: SelectionRegistry,
        verifier: Verifier,
    ) -> None:
        """Build the communicator, on every rank of the group at the same time.

        Args:
            pp_group: ranks of the pipeline.
            config: Megatron's model configuration.
            hidden_size: H.
            sparse_out: for each model chunk of this rank, whether its output is a TopK output.
            selections: registry of TopK outputs and of hidden states that arrive sparsely.
            verifier: checks messages in verified steps.
        """
        super().__init__(pp_group, config)
        self.hidden_size, self.selections, self.verifier = hidden_size, selections, verifier
        selections.active = True
        everyone: list[Any] = [None] * pp_group.size()
        dist.all_gather_object(everyone, list(sparse_out), group=pp_group)
        self._sparse_out: list[bool] = everyone[pp_group.rank()]
        self._sparse_in: list[bool] = everyone[pp_group.rank() - 1]
        self._forward_only = False
        self._wire: WireFormat | None = None
        self._order: dict[str, deque[int]] = {}
        self._sent: dict[int, deque[Tensor]] = {}
        self._received: dict[int, deque[Tensor]] = {}

    def begin(self, k: int, num_microbatches: int, *, forward_only: bool) -> None:
        """Open a step before its first message, with the same arguments on every rank."""
        assert not any(self._sent.values()), "gradients of the step before are missing"
        assert not any(self._received.values()), "gradients of the step before are missing"
        self._forward_only = forward_only
        self._wire = wire_format(self.hidden_size, k, self.config.pipeline_dtype)
        order = self._message_order(num_microbatches)
        self._order = {name: deque(stages) for name, stages in vars(order).items()}
        self._sent = {chunk: deque() for chunk in range(len(self._sparse_out))}
        self._received = {chunk: deque() for chunk in range(len(self._sparse_in))}

    def _message_order(self, num_microbatches: int) -> MessageOrder:
        return message_order(
            rank=self.pp_group.rank(),
            size=self.pp_group.size(),
            chunks=len(self._sparse_out),
            microbatches=num_microbatches,
            group_size=self.config.microbatch_group_size_per_vp_stage,
        )

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> Any:
        """Override the method through which every send and receive of a schedule goes."""
        outgoing = {
            "send_prev": self._pack_gradient(tensor_send_prev),
            "send_next": self._pack_hidden(tensor_send_next),
        }
        hidden, hidden_buffer, hidden_done = self._expect_hidden(recv_prev, tensor_shape)
        gradient, gradient_buffer, gradient_done = self._expect_gradient(recv_next, tensor_shape)
        buffers = {**outgoing, "recv_prev": hidden_buffer, "recv_next": gradient_buffer}
        finish = {"recv_prev": hidden_done, "recv_next": gradient_done}
        requests = self._start(buffers, finish)
        if wait_on_reqs:
            for request in requests.values():
                request.wait()
            if self.config.batch_p2p_comm and self.config.batch_p2p_sync:
                torch.cuda.synchronize()
            return hidden, gradient, None
        return hidden, gradient, requests

    def _start(
        self, buffers: dict[str, Tensor | None], finish: dict[str, Callable[[], None] | None]
    ) -> dict[str, Arrival]:
        """Hand the buffers to the process group in Megatron's order."""
        module: Any = p2p_communication
        start = module._batched_p2p_ops if self.config.batch_p2p_comm else module._p2p_ops
        try:
            started = start(
                **{f"tensor_{name}": buffer for name, buffer in buffers.items()},
                group=self.pp_group,
                prev_pipeline_rank=self.prev_rank,
                next_pipeline_rank=self.next_rank,
            )
        except RuntimeError as error:
            raise TransportError(
                f"pipeline ranks {self.prev_rank} and {self.next_rank} cannot be reached: "
                f"{' '.join(str(error).split())}"
            ) from error
        if isinstance(started, list):
            # A batch lists its requests in this order; NCCL may merge them into one.
            posted = ("send_prev", "recv_prev", "send_next", "recv_next")
            names = [name for name in posted if buffers[name] is not None]
            if len(started) != len(names):
                return {"batch": Arrival(_All(started), self._peer("batch"), _run_all(finish))}
            started = dict(zip(names, started, strict=True))
        return {
            name: Arrival(request, self._peer(name), finish.get(name))
            for name, request in started.items()
        }

    def _peer(self, name: str) -> str:
        ranks = {"prev": f"rank {self.prev_rank}", "next": f"rank {self.next_rank}"}
        return ranks.get(name.partition("_")[2], f"rank {self.prev_rank} or {self.next_rank}")

    def _is_sparse(self, sparse: list[bool], boundary: int) -> bool:
        return self._wire is not None and sparse[boundary]

    def _pack_hidden(self, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        boundary = self._order["forward_out"].popleft()
        if not self._is_sparse(self._sparse_out, boundary):
            return x
        assert self._wire is not None
        assert x.dtype == self._wire.dtype, (x.dtype, self._wire.dtype)
        selection = self.selections.of(x)
        assert selection is not None, "the output of a TopK layer changed before it was sent"
        assert selection.bits_NW is not None
        message, indices = pack_hidden(self._wire, x, selection.bits_NW)
        if not self._forward_only:
            self._sent[boundary].append(indices)
        return self.verifier.extend(message, x)

    def _pack_gradient(self, dx: Tensor | None) -> Tensor | None:
        if dx is None:
            return None
        boundary = self._order["backward_out"].popleft()
        if not self._is_sparse(self._sparse_in, boundary):
            return dx
        indices = self._received[boundary].popleft()
        return self.verifier.extend(pack_gradient(dx, indices), dx)

    def _expect_hidden(self, expected: bool, shape: Any) -> Any:
        """Return the tensor for the hidden state, the buffer to receive and how to unpack it."""
        if not expected:
            return None, None, None
        x = self._empty(shape)
        boundary, wire = self._order["forward_in"].popleft(), self._wire
        if wire is None or not self._is_sparse(self._sparse_in, boundary):
            return x, x, None
        size = wire.message_bytes(x.numel() // self.hidden_size)
        buffer = self.verifier.buffer(size, x)

        def finish() -> None:
            message = self.verifier.strip(buffer, size)
            indices = unpack_hidden(wire, message, x)
            self.verifier.check_hidden(buffer, size, x)
            if not self._forward_only:
                self._received[boundary].append(indices)
                self.selections.remember(x, Selection(x.shape, wire.k, indices_NK=indices))

        return x, buffer, finish

    def _expect_gradient(self, expected: bool, shape: Any) -> Any:
        """Do what `_expect_hidden` does, for a gradient."""
        if not expected:
            return None, None, None
        dx = self._empty(shape)
        boundary, wire = self._order["backward_in"].popleft(), self._wire
        if wire is None or not self._is_sparse(self._sparse_out, boundary):
            return dx, dx, None
        indices = self._sent[boundary].popleft()
        size = wire.values_bytes(indices.shape[0])
        buffer = self.verifier.buffer(size, dx)

        def finish() -> None:
            unpack_gradient(wire, self.verifier.strip(buffer, size), indices, dx)
            self.verifier.check_gradient(buffer, size, dx, indices)

        return dx, buffer, finish

    def _empty(self, shape: Any) -> Tensor:
        return torch.empty(
            shape,
            requires_grad=True,
            device=torch.cuda.current_device(),
            dtype=self.config.pipeline_dtype,
        )


class _All:
    """Several requests that are waited for together."""

    def __init__(self, requests: list[Any]) -> None:
        self._requests = requests

    def wait(self) -> None:
        for request in self._requests:
            request.wait()


def _run_all(finish: dict[str, Callable[[], None] | None]) -> Callable[[], None]:
    def run() -> None:
        for function in finish.values():
            if function is not None:
                function()

    return run
