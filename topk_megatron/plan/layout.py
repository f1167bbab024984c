"""How a model is split over GPUs: parallel sizes, recompute and sparsity."""

from dataclasses import dataclass

from topk_megatron.plan.shape import Shape


@dataclass(frozen=True, kw_only=True)
class Layout:
    """tp x pp x dp ranks, in Megatron's order: tensor ranks are neighbours, pipeline stages apart.

    Sequence parallelism is on when tp is above 1; the distributed optimizer is always on.

    Attributes:
        tp: Tensor-parallel size.
        pp: Pipeline-parallel size.
        dp: Data-parallel size.
        recompute: Whether the backward pass computes every layer again (full recompute).
        sparse_p2p: ``--topk-sparse-p2p``.
        sparse_save: ``--topk-sparse-save``.
    """

    tp: int
    pp: int
    dp: int
    recompute: bool = False
    sparse_p2p: bool = False
    sparse_save: bool = False

    @property
    def ranks(self) -> int:
        """Number of ranks of the job."""
        return self.tp * self.pp * self.dp

    def microbatches(self, shape: Shape) -> int:
        """Return the microbatches per step on one data-parallel replica."""
        return shape.global_batch // (shape.micro_batch * self.dp)

    def tokens(self, shape: Shape) -> float:
        """Return the tokens of a microbatch on one rank, under sequence parallelism."""
        return shape.sequence * shape.micro_batch / self.tp

    def words(self) -> str:
        """Return the layout as one line of text."""
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
