"""Which pipe of a Hopper processor executes which SASS opcode, and how fast: one table.

Sources:
- CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions", compute capability
  9.0: results per cycle and processor, which give the rates below.
- Nsight Compute, Kernel Profiling Guide, "Pipelines": ALU executes bit manipulation, logic and
  integers except IMAD; FMA executes float32, FMAheavy also IMAD and IDP; LSU, XU, uniform.
- https://forums.developer.nvidia.com/t/302018/7 (NVIDIA): on GH100, packed halves use both halves
  of the FMA pipe at once, so they run at its full rate.

Uncertain:
- HSET2 and HSETP2: no source names their pipe on Hopper. They are counted as "half compare", and
  estimates are given for both readings: ALU, or FMA.
- CS2R, R2UR, I2FP, F2FP, VABSDIFF: assumed ALU. MATCH: assumed XU. LDC, S2R, S2UR: queued
  outside the arithmetic pipes, counted as "other", which costs issue slots alone.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

CLOCK_HZ = 1.755e9
PROCESSORS = 132
ISSUE = 128  # thread instructions per cycle and processor: four warps
BYTES_PER_SECOND = {"H100": 3.35e12, "H200": 4.8e12}

# Lanes per cycle and processor. FMA heavy is a part of FMA; "half compare" has no rate of its own.
RATES = {"ALU": 64, "FMA": 128, "FMA heavy": 64, "LSU": 32, "XU": 16, "REDUX": 16}
HALF_COMPARE = "half compare"
PIPES = (*RATES, HALF_COMPARE, "uniform", "control", "other")

_OPCODES = {
    "ALU": "IADD3 VIADD IABS VABSDIFF IMNMX VIMNMX VIMNMX3 VIADDMNMX ISETP SEL LOP3 PLOP3 SHF "
    "LEA ELECT PRMT SGXT BMSK MOV P2R R2P VOTE VOTEU CS2R R2UR FSETP FSET FMNMX FSEL FCHK "
    "HMNMX2 VHMNMX F2FP I2FP",
    "FMA": "FADD FMUL FFMA HADD2 HMUL2 HFMA2",
    "FMA heavy": "IMAD IDP",
    HALF_COMPARE: "HSET2 HSETP2",
    "LSU": "LDG STG LDS STS LDL STL ATOMS ATOMG RED REDG SHFL LDGSTS",
    "XU": "MUFU I2I I2F F2I F2F POPC FLO BREV MATCH",
    "REDUX": "REDUX",
    "control": "BRA BAR B2R CALL RET EXIT BPT NOP YIELD NANOSLEEP BSSY BSYNC BREAK BMOV WARPSYNC "
    "ENDCOLLECTIVE MEMBAR ERRBAR CCTL DEPBAR LDGDEPBAR",
    "other": "LDC S2R S2UR",
}
PIPE_OF = {opcode: pipe for pipe, opcodes in _OPCODES.items() for opcode in opcodes.split()}


def pipe_of(name: str) -> str:
    """Return the pipe of an opcode with its modifiers, such as IMAD.MOV.U32.

    Raises:
        KeyError: the table does not know the opcode.
    """
    opcode = name.split(".")[0]
    if opcode in PIPE_OF:
        return PIPE_OF[opcode]
    if opcode.startswith("U") and PIPE_OF.keys() & {opcode[1:]}:
        return "uniform"
    raise KeyError(f"tests/cuda/hopper.py does not know the pipe of {name}")


def by_pipe(opcodes: Mapping[str, int]) -> Counter[str]:
    """Sum warp instructions by pipe. FMA includes FMA heavy."""
    counts: Counter[str] = Counter()
    for name, count in opcodes.items():
        pipe = pipe_of(name)
        counts[pipe] += count
        if pipe == "FMA heavy":
            counts["FMA"] += count
    return counts


@dataclass(frozen=True)
class Estimate:
    """The shortest time that the limits allow, in seconds, and which limit that is."""

    seconds: float
    limit: str


def least_time(
    thread_instructions: Mapping[str, float], issued: float, moved_bytes: float, device: str,
    *, half_compare: str,
) -> Estimate:  # fmt: skip
    """Return the largest of the times that pipes, issue and memory need.

    Args:
        thread_instructions: by pipe; a warp instruction is 32 of them.
        issued: thread instructions in all.
        moved_bytes: to and from memory.
        device: a key of BYTES_PER_SECOND.
        half_compare: the pipe that executes half compares, "ALU" or "FMA".
    """
    times = {"memory": moved_bytes / BYTES_PER_SECOND[device]}
    times["issue"] = issued / (PROCESSORS * ISSUE * CLOCK_HZ)
    for pipe, rate in RATES.items():
        lanes = thread_instructions.get(pipe, 0.0)
        if pipe == half_compare:
            lanes += thread_instructions.get(HALF_COMPARE, 0.0)
        times[pipe] = lanes / (PROCESSORS * rate * CLOCK_HZ)
    limit = max(times, key=times.__getitem__)
    return Estimate(times[limit], limit)
