"""How a model is cut over GPUs: tensor, pipeline and data parallel sizes, recompute, sparsity."""

from dataclasses import dataclass

from topk_megatron.plan.shape import Shape


@dataclass(frozen=True, kw_only=True)
class Layout:
    """tp x pp x dp ranks, in Megatron's order: tensor ranks are neighbours, pipeline stages apart.

    With tp above 1 sequence parallelism is on; the distributed optimizer always is.

    Attributes:
        recompute: whether every layer is computed again in the backward pass (full, each layer).
        sparse_p2p, sparse_save: ``--topk-sparse-p2p`` and ``--topk-sparse-save``.
    """

    tp: int
    pp: int
    dp: int
    recompute: bool = False
    sparse_p2p: bool = False
    sparse_save: bool = False

    @property
    def ranks(self) -> int:
        """All ranks of the job."""
        return self.tp * self.pp * self.dp

    def microbatches(self, shape: Shape) -> int:
        """Microbatches of a step on one data-parallel replica."""
        return shape.global_batch // (shape.micro_batch * self.dp)

    def tokens(self, shape: Shape) -> float:
        """Tokens of a microbatch on one rank, under sequence parallelism."""
        return shape.sequence * shape.micro_batch / self.tp

    def words(self) -> str:
        """As a line of text says it."""
        extras = {
            "recompute": self.recompute,
            "sparse transport": self.sparse_p2p,
            "sparse saving": self.sparse_save,
        }
        return ", ".join(
            [
                f"TP {self.tp}",
                f"PP {self.pp}",
                f"DP {self.dp}",
                *(k for k, on in extras.items() if on),
            ]
        )
