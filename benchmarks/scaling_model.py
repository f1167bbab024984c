"""The paper model of docs/scaling.md: bytes and shares of step time, from sizes alone.

    python benchmarks/scaling_model.py

Nothing here is measured. Assumptions are the constants below; docs/scaling.md discusses them.
"""

from dataclasses import dataclass

BYTES = 2  # bfloat16
FLOPS = 400e12  # a second and GPU: 40 % of an H100's dense bfloat16 peak
PACK_BANDWIDTH = 2e12  # bytes a second that packing and unpacking reach in GPU memory
PACK_LAUNCHES = 50e-6  # seconds a transfer for the launches of packing and unpacking
STATE_BYTES = 18  # a parameter: weights, gradients, Adam's state in mixed precision
HIDDEN_PER_K = 16
SEQUENCE = 4096
# Bytes a second in one direction that one GPU has for itself.
LINKS = {
    "NVLink 4 (450 GB/s)": 450e9,
    "InfiniBand NDR (50 GB/s)": 50e9,
    "Ethernet 100 Gbit/s for 8 GPUs": 12.5e9 / 8,
    "Ethernet 10 Gbit/s for 8 GPUs": 1.25e9 / 8,
}


@dataclass(frozen=True)
class Model:
    """A dense transformer of 12 L H² parameters and its layout, one sequence a microbatch."""

    name: str
    layers: int
    hidden: int
    tensor: int
    pipeline: int

    @property
    def parameters(self) -> float:
        return 12 * self.layers * self.hidden**2

    @property
    def dense_bytes(self) -> float:
        """A hidden state of a microbatch on one GPU, under sequence parallelism."""
        return SEQUENCE * self.hidden * BYTES / self.tensor

    @property
    def forward_bytes(self) -> float:
        """The same as values and a bitmask."""
        k = self.hidden / HIDDEN_PER_K
        return SEQUENCE * (k * BYTES + self.hidden / 8) / self.tensor

    @property
    def backward_bytes(self) -> float:
        """Its gradient on S."""
        return self.dense_bytes / HIDDEN_PER_K

    @property
    def compute_seconds(self) -> float:
        """Forward and backward of a microbatch on one stage."""
        return 6 * self.parameters / self.pipeline / self.tensor * SEQUENCE / FLOPS

    @property
    def pack_seconds(self) -> float:
        """Packing, unpacking and their launches, both directions: about 4 dense passes each."""
        return 2 * (4 * self.dense_bytes / PACK_BANDWIDTH + PACK_LAUNCHES)

    def shares(self, bandwidth: float) -> tuple[float, float]:
        """Transport over compute, dense and sparse, where nothing overlaps."""
        dense = 2 * self.dense_bytes / bandwidth
        sparse = (self.forward_bytes + self.backward_bytes) / bandwidth + self.pack_seconds
        return dense / self.compute_seconds, sparse / self.compute_seconds

    def kept_bytes(self, sequence_parallel: bool) -> tuple[float, float]:
        """Inputs of recomputed layers on one GPU with a full pipeline, dense and sparse."""
        split = 1 if sequence_parallel else self.tensor
        dense = self.layers * self.dense_bytes * split
        return dense, dense * self.forward_bytes / self.dense_bytes

    @property
    def state_bytes(self) -> float:
        """Parameters and optimizer on one GPU, without a distributed optimizer."""
        return STATE_BYTES * self.parameters / self.tensor / self.pipeline


MODELS = (
    Model("1B", 20, 2048, 1, 4),
    Model("7B", 32, 4096, 2, 4),
    Model("70B", 80, 8192, 8, 8),
    Model("175B", 96, 12288, 8, 12),
    Model("500B", 120, 18432, 8, 24),
)


def print_transport() -> None:
    """Shares of step time."""
    print("| model | layers x hidden | TP x PP | MB a transfer: dense, forward, backward | " + " | ".join(LINKS) + " |")  # fmt: skip  # noqa: E501
    print("|---|---|---|---|" + "---|" * len(LINKS))
    for model in MODELS:
        sizes = (model.dense_bytes, model.forward_bytes, model.backward_bytes)
        megabytes = ", ".join(f"{size / 1e6:.2f}" for size in sizes)
        cells = []
        for bandwidth in LINKS.values():
            dense, sparse = model.shares(bandwidth)
            cells.append(f"{100 * dense:.1f} % → {100 * sparse:.1f} %")
        print(
            f"| {model.name} | {model.layers} x {model.hidden} | {model.tensor} x {model.pipeline}"
            f" | {megabytes} | " + " | ".join(cells) + " |"
        )


def print_memory() -> None:
    """Gigabytes of saved activations."""
    print("| model | parameters and optimizer, GB a GPU | kept, sequence parallel, GB | kept, not sequence parallel, GB |")  # fmt: skip  # noqa: E501
    print("|---|---|---|---|")
    for model in MODELS:
        cells = []
        for sequence_parallel in (True, False):
            dense, sparse = model.kept_bytes(sequence_parallel)
            cells.append(f"{dense / 1e9:.2f} → {sparse / 1e9:.2f}")
        print(f"| {model.name} | {model.state_bytes / 1e9:.1f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    print_transport()
    print()
    print_memory()
