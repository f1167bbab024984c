"""What `benchmarks/parallel.py` runs on each rank: dense and sparse steps of one training in turn.

Sparse transport and saving change no bit, so that even and odd steps can take one way and the other
while the training is the same. Every rank writes its bytes and times into TOPK_BENCHMARK.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from topk_megatron.cli import exit_on_user_error
from topk_megatron.device import prepare_device
from topk_megatron.testing.traffic import counted_traffic

WARM_UP = 2  # steps of each kind that are not counted


class KeptBytes:
    """Bytes of distinct memory that autograd keeps while the decoder runs, parameters aside."""

    def __init__(self, saver: Any) -> None:
        self.saver, self.pack = saver, saver._pack
        self.sparse = True
        self.total = self.topk = 0
        self._seen: set[int] = set()
        saver._pack = self

    def begin(self, sparse: bool) -> None:
        """Open a step."""
        self.sparse, self.total, self.topk = sparse, 0, 0
        self._seen.clear()
        self.saver.dense_bytes = self.saver.packed_bytes = 0

    def __call__(self, tensor: Tensor) -> Any:
        known = self.saver._known.get(tensor.data_ptr())
        is_topk = known is not None and known.is_the_memory_of(tensor)
        before = self.saver.packed_bytes
        packed = self.pack(tensor) if self.sparse else tensor
        if isinstance(packed, Tensor):
            size = 0
            is_parameter = tensor.is_leaf and tensor.requires_grad and not is_topk
            if tensor.data_ptr() not in self._seen and not is_parameter:
                size = tensor.numel() * tensor.element_size()
        else:
            size = self.saver.packed_bytes - before
        self._seen.add(tensor.data_ptr())
        self.total += size
        self.topk += size if is_topk else 0
        return packed


def main_of(device: str) -> None:
    """Train and measure."""
    from topk_megatron.train import pipeline
    from topk_megatron.train.main import run

    records: list[dict[str, Any]] = []
    kept: list[KeptBytes] = []
    original = pipeline.ParallelFeatures.schedule

    with counted_traffic() as traffic:

        def schedule(self: Any, stock: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("forward_only"):
                return original(self, stock, *args, **kwargs)
            sparse = len(records) % 2 == 1
            if self.runtime.saver is not None:
                kept.append(kept[0] if kept else KeptBytes(self.runtime.saver))
                kept[0].begin(sparse)
            self.runtime.keeps_selection = self.sends_sparsely and sparse
            if self.sends_sparsely and not records:
                self._prepare(
                    kwargs["model"] if isinstance(kwargs["model"], list) else [kwargs["model"]]
                )
            before = traffic.bytes["send"]
            dist.barrier()
            begin = time.perf_counter()
            if sparse or not self.sends_sparsely:
                result = original(self, stock, *args, **kwargs)
            else:
                result = stock(*args, **kwargs)
            dist.barrier()
            record = {
                "sparse": sparse,
                "seconds": time.perf_counter() - begin,
                "sent_bytes": traffic.bytes["send"] - before,
                "microbatches": kwargs["num_microbatches"],
            }
            if kept:
                record |= {"kept_bytes": kept[0].total, "kept_topk_bytes": kept[0].topk}
            records.append(record)
            return result

        pipeline.ParallelFeatures.schedule = schedule
        run(device)
    path = Path(os.environ["TOPK_BENCHMARK"]) / f"rank{os.environ['RANK']}.json"
    path.write_text(json.dumps(records[2 * WARM_UP :]))


@exit_on_user_error
def main() -> None:
    """Prepare the device, then train."""
    main_of(prepare_device())


if __name__ == "__main__":
    main()
