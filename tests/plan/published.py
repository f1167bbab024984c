"""Ten published training runs: arXiv 2104.04473, table 1.

They are GPT models with sequences of 2048 tokens and a vocabulary of 51,200, on A100s of 80 GB,
eight per node, with HDR InfiniBand and full recompute. The table gives neither the microbatch size
nor the depth of interleaving; we assume 1 and none.
"""

from typing import NamedTuple

from topk_megatron.plan.command_lines import shape_of
from topk_megatron.plan.shape import Shape

SEQUENCE, VOCABULARY = 2048, 51200


class Published(NamedTuple):
    """A row; `teraflops` is what a GPU reached, in 10¹² operations per second."""

    billions: float
    heads: int
    hidden: int
    layers: int
    tp: int
    pp: int
    gpus: int
    batch: int
    teraflops: float

    def operations(self) -> float:
        """Return a step's operations as in the paper: with recompute, attention not halved."""
        size = self.layers * self.hidden**2
        scores = SEQUENCE / (6 * self.hidden)
        output = VOCABULARY / (16 * self.layers * self.hidden)
        return 96 * self.batch * SEQUENCE * size * (1 + scores + output)


MODELS = (
    Published(1.7, 24, 2304, 24, 1, 1, 32, 512, 137),
    Published(3.6, 32, 3072, 30, 2, 1, 64, 512, 138),
    Published(7.5, 32, 4096, 36, 4, 1, 128, 512, 142),
    Published(18.4, 48, 6144, 40, 8, 1, 256, 1024, 135),
    Published(39.1, 64, 8192, 48, 8, 2, 512, 1536, 138),
    Published(76.1, 80, 10240, 60, 8, 4, 1024, 1792, 140),
    Published(145.6, 96, 12288, 80, 8, 8, 1536, 2304, 148),
    Published(310.1, 128, 16384, 96, 8, 16, 1920, 2160, 155),
    Published(529.6, 128, 20480, 105, 8, 35, 2520, 2520, 163),
    Published(1008.0, 160, 25600, 128, 8, 64, 3072, 3072, 163),
)


def published_shape(model: Published) -> Shape:
    """Return the shape of a published model."""
    sizes = {
        "--num-layers": model.layers,
        "--hidden-size": model.hidden,
        "--num-attention-heads": model.heads,
        "--seq-length": SEQUENCE,
        "--max-position-embeddings": SEQUENCE,
        "--vocab-size": VOCABULARY,
        "--global-batch-size": model.batch,
    }
    flags = [word for pair in sizes.items() for word in map(str, pair)]
    return shape_of([*flags, "--topk-layers", "none"])
