"""The worker that `benchmarks/parallel.py` runs on each rank: alternating dense and sparse steps.

Sparse transport and saving change no bit, so even steps can be dense and odd steps sparse in the
same training. Every rank writes its bytes and times into the directory TOPK_BENCHMARK.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from topk_megatron.cli import exit_on_user_error
from topk_megatron.compat import prepare_device

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the tests' harness
from tests.harness.traffic import Traffic, counted_traffic

WARM_UP = 2  # number of first steps of each kind that are not counted


class KeptBytes:
    """Counts the bytes of distinct memory that autograd keeps for the layers, without parameters.

    The decoder's final norm is left out: it is not an input of a recomputed layer, and torch's norm
    keeps several float32 tensors of its own.
    """

    def __init__(self, saver: Any, decoder: Any) -> None:
        self.saver, self.pack, self.enter = saver, saver._pack, saver.enter
        self.sparse = True
        self.total = self.topk = 0
        self._seen: set[int] = set()
        self._in_layers = True
        saver._pack, saver.enter = self, self._begin_microbatch
        if decoder.final_layernorm is not None:
            decoder.final_layernorm.register_forward_pre_hook(self._leave_layers)

    def _begin_microbatch(self, received: Tensor | None) -> None:
        self._seen.clear()  # addresses are reused
        self._in_layers = True
        self.enter(received)

    def _leave_layers(self, *_: Any) -> None:
        self._in_layers = False

    def begin(self, sparse: bool) -> None:
        """Open a step."""
        self.sparse, self.total, self.topk = sparse, 0, 0
        self.saver.dense_bytes = self.saver.packed_bytes = 0

    def __call__(self, tensor: Tensor) -> Any:
        is_topk = self.saver.selections.of(tensor) is not None
        before = self.saver.packed_bytes
        packed = self.pack(tensor) if self.sparse else tensor
        if isinstance(packed, Tensor):
            size = 0
            if tensor.data_ptr() not in self._seen and not isinstance(tensor, Parameter):
                size = tensor.numel() * tensor.element_size()
        else:
            size = self.saver.packed_bytes - before
        self._seen.add(tensor.data_ptr())
        if not self._in_layers:
            return packed
        self.total += size
        self.topk += size if is_topk else 0
        return packed


class Alternation:
    """Runs Megatron's schedule densely in even training steps and sparsely in odd ones."""

    def __init__(self, traffic: Traffic) -> None:
        from topk_megatron.train.schedule import StepRunner

        self.traffic = traffic
        self.records: list[dict[str, Any]] = []
        self.kept: KeptBytes | None = None
        self.original = StepRunner.run_step

    def schedule(self, features: Any, stock: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a step in place of `StepRunner.run_step`."""
        if kwargs.get("forward_only"):
            return self.original(features, stock, *args, **kwargs)
        sparse = len(self.records) % 2 == 1
        self._prepare(features, kwargs["model"], sparse)
        before = self.traffic.bytes["send"]
        dist.barrier()
        begin = time.perf_counter()
        if sparse or not features.sends_sparsely:
            result = self.original(features, stock, *args, **kwargs)
        else:
            result = stock(*args, **kwargs)
        dist.barrier()
        record: dict[str, Any] = {
            "sparse": sparse,
            "seconds": time.perf_counter() - begin,
            "sent_bytes": self.traffic.bytes["send"] - before,
            "microbatches": kwargs["num_microbatches"],
        }
        if self.kept is not None:
            record |= {"kept_bytes": self.kept.total, "kept_topk_bytes": self.kept.topk}
        self.records.append(record)
        return result

    def _prepare(self, features: Any, model: Any, sparse: bool) -> None:
        from megatron.core.utils import get_attr_wrapped_model
        from megatron.training import get_args

        chunks = model if isinstance(model, list) else [model]
        features._prepare(get_args(), chunks)
        # Dense steps need no selections, except to count the bytes that a saver would have packed.
        features.runtime.selections.active = sparse or features.saver is not None
        if features.saver is not None:
            if self.kept is None:
                decoder = get_attr_wrapped_model(chunks[0], "decoder")
                self.kept = KeptBytes(features.saver, decoder)
            self.kept.begin(sparse)


def main_of(device: str) -> None:
    """Train and measure."""
    from topk_megatron.train.main import run
    from topk_megatron.train.schedule import StepRunner

    with counted_traffic() as traffic:
        alternation = Alternation(traffic)
        schedule: Any = lambda *args, **kwargs: alternation.schedule(*args, **kwargs)  # noqa: E731
        StepRunner.run_step = schedule
        run(device)
    path = Path(os.environ["TOPK_BENCHMARK"]) / f"rank{os.environ['RANK']}.json"
    path.write_text(json.dumps(alternation.records[2 * WARM_UP :]))


@exit_on_user_error
def main() -> None:
    """Prepare the device, then train."""
    main_of(prepare_device())


if __name__ == "__main__":
    main()
