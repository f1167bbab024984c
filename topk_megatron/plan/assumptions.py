"""Every number of a plan that is assumed rather than counted, in one table with its source.

Peaks come from data sheets, reached shares from publications. This project measured none of them.
`python tools/plan.py --assumptions` prints the table.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from topk_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """A named number.

    Attributes:
        name: What the number is, with its unit.
        value: The number, in that unit.
        source: Where it comes from, or why it was chosen.
    """

    name: str
    value: float
    source: str


COMPUTE_EFFICIENCY = Assumption(
    name="share of a GPU's peak that a layer's kernels reach, without communication or bubble",
    value=0.5,
    source="chosen so that whole steps come out near published ones: 41 to 48 % of H100s' peak "
    "(Megatron-LM's README), 43 to 52 % of A100s' (arXiv 2104.04473, table 1)",
)
USABLE_MEMORY = Assumption(
    name="share of a GPU's memory for the model; CUDA, NCCL and fragmentation take the rest",
    value=0.9,
    source="a guess",
)
LINK_EFFICIENCY = Assumption(
    name="share of a link's peak that large messages reach",
    value=0.8,
    source="a guess, close to common reports for nccl-tests",
)
PASS_EFFICIENCY = Assumption(
    name="share of a GPU's memory bandwidth that TopK, packing and unpacking reach",
    value=0.6,
    source="a guess; these kernels were not timed on a GPU",
)
PACK_LAUNCHES = Assumption(
    name="seconds of kernel launches to pack and unpack one message",
    value=50e-6,
    source="a guess: about ten launches",
)
SCALARS = (COMPUTE_EFFICIENCY, USABLE_MEMORY, LINK_EFFICIENCY, PASS_EFFICIENCY, PACK_LAUNCHES)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator, by its data sheet.

    Attributes:
        name: The name on the command line.
        memory: Its memory in bytes.
        flops: Dense bfloat16 operations per second, at peak.
        bandwidth: Memory bandwidth in bytes per second.
        nvlink: Bytes per second in one direction to the other GPUs of its node.
        source: The data sheet.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    nvlink: float
    source: str


_GPUS = (
    Gpu(
        name="a100-40",
        memory=40e9,
        flops=312e12,
        bandwidth=1.56e12,
        nvlink=300e9,
        source="NVIDIA A100 data sheet, SXM 40 GB",
    ),
    Gpu(
        name="a100-80",
        memory=80e9,
        flops=312e12,
        bandwidth=2.04e12,
        nvlink=300e9,
        source="NVIDIA A100 data sheet, SXM 80 GB",
    ),
    Gpu(
        name="h100",
        memory=80e9,
        flops=989e12,
        bandwidth=3.35e12,
        nvlink=450e9,
        source="NVIDIA H100 data sheet, SXM, without sparsity",
    ),
    Gpu(
        name="h200",
        memory=141e9,
        flops=989e12,
        bandwidth=4.8e12,
        nvlink=450e9,
        source="NVIDIA H200 data sheet, SXM, without sparsity",
    ),
    Gpu(
        name="b200",
        memory=180e9,
        flops=2250e12,
        bandwidth=7.7e12,
        nvlink=900e9,
        source="NVIDIA HGX B200 data sheet, without sparsity",
    ),
)
GPUS = {gpu.name: gpu for gpu in _GPUS}

# Between nodes: bytes per second in one direction for each GPU of a node, at peak.
LINKS = {
    "xdr": Assumption(name="InfiniBand XDR, one port per GPU", value=100e9, source="800 Gbit/s"),
    "ndr": Assumption(name="InfiniBand NDR, one port per GPU", value=50e9, source="400 Gbit/s"),
    "hdr": Assumption(name="InfiniBand HDR, one port per GPU", value=25e9, source="200 Gbit/s"),
    "eth100": Assumption(
        name="100 Gbit/s Ethernet for 8 GPUs", value=12.5e9 / 8, source="100 Gbit/s per node"
    ),
    "eth10": Assumption(
        name="10 Gbit/s Ethernet for 8 GPUs", value=1.25e9 / 8, source="10 Gbit/s per node"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster of equal machines.

    Attributes:
        gpu: The accelerator.
        nodes: Number of machines.
        gpus_per_node: GPUs of one machine.
        inside: Peak bytes per second in one direction per GPU, inside a node.
        between: Peak bytes per second in one direction per GPU, between nodes.
        link: The link between nodes, as on the command line.
        efficiency: Share of the peak that compute reaches; see `COMPUTE_EFFICIENCY`.
    """

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    inside: float
    between: float
    link: str
    efficiency: float = COMPUTE_EFFICIENCY.value

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return self.nodes * self.gpus_per_node

    @property
    def memory(self) -> float:
        """Bytes of a GPU's memory that a model may use."""
        return USABLE_MEMORY.value * self.gpu.memory

    @property
    def flops(self) -> float:
        """Operations per second that a GPU is assumed to reach."""
        return self.efficiency * self.gpu.flops

    @property
    def passes(self) -> float:
        """Memory bandwidth in bytes per second that TopK and packing are assumed to reach."""
        return PASS_EFFICIENCY.value * self.gpu.bandwidth

    def seconds(self, size: float, *, inside: bool, ports: int = 1) -> float:
        """Time to send `size` bytes from one GPU, in seconds.

        Args:
            size: Number of bytes.
            inside: Whether sender and receiver are in one node.
            ports: Number of links between nodes that carry it in parallel.
        """
        peak = self.inside if inside else min(self.inside, self.between * ports)
        return size / (LINK_EFFICIENCY.value * peak)


def cluster_of(
    gpu: str,
    nodes: int,
    gpus_per_node: int,
    link: str,
    *,
    nvlink: float | None = None,
    efficiency: float | None = None,
) -> Cluster:
    """Build a cluster from names.

    Args:
        gpu: A name in `GPUS`.
        nodes: Number of machines.
        gpus_per_node: GPUs of one machine.
        link: The link between nodes: a name in `LINKS`, or gigabytes per second per GPU.
        nvlink: Gigabytes per second per GPU in one direction inside a node; None for the data
            sheet's.
        efficiency: Replaces `COMPUTE_EFFICIENCY`.

    Raises:
        ConfigError: If a name is unknown or a number is out of range.
    """
    if gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu} is unknown; choose one of {', '.join(GPUS)}")
    for flag, count in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
        if count < 1:
            raise ConfigError(f"{flag} must be at least 1, got {count}")
    if efficiency is not None and not 0 < efficiency <= 1:
        raise ConfigError(f"--efficiency is a share of the peak in (0, 1], got {efficiency}")
    if nvlink is not None and nvlink <= 0:
        raise ConfigError(f"--nvlink must be above 0 GB/s, got {nvlink}")
    return Cluster(
        gpu=GPUS[gpu],
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        inside=GPUS[gpu].nvlink if nvlink is None else nvlink * 1e9,
        between=_bandwidth(link),
        link=link,
        efficiency=COMPUTE_EFFICIENCY.value if efficiency is None else efficiency,
    )


def _bandwidth(link: str) -> float:
    if link in LINKS:
        return LINKS[link].value
    try:
        found = float(link) * 1e9
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise ConfigError(
            f"--link {link} is unknown; choose one of {', '.join(LINKS)}, or give GB/s per GPU"
        )
    return found


def assumption_rows() -> Iterator[tuple[str, str, str]]:
    """Yield name, value and source of everything above, as text."""
    for scalar in SCALARS:
        yield scalar.name, f"{scalar.value:g}", scalar.source
    for gpu in GPUS.values():
        value = (
            f"{gpu.memory / 1e9:g} GB, {gpu.flops / 1e12:g} TFLOP/s bfloat16, memory "
            f"{gpu.bandwidth / 1e12:g} TB/s, NVLink {gpu.nvlink / 1e9:g} GB/s in one direction"
        )
        yield gpu.name, value, gpu.source
    for name, link in LINKS.items():
        yield f"{name}: {link.name}", f"{link.value / 1e9:g} GB/s per GPU", link.source
