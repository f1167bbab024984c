"""Tests of the head of a test run, which names its machine."""

from typing import Any

import pytest

from tests.harness.processor import describe_processor

XEON = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C
flags\t\t: fpu avx2 avx512f avx512bw amx_bf16 amx_tile

processor\t: 1
model name\t: another
flags\t\t: fpu
"""


@pytest.mark.parametrize(
    ("cpuinfo", "start", "end"),
    [
        (XEON, "Intel(R) Xeon(R) Platinum 8481C, ", "logical cores, AVX-512 yes, AMX yes"),
        ("model name: EPYC\nflags: avx512f", "EPYC, ", "logical cores, AVX-512 yes, AMX no"),
        ("model name: old\nflags: sse2", "old, ", "logical cores, AVX-512 no, AMX no"),
        ("processor: 0\nFeatures: fp asimd", "", "logical cores"),
        ("", "", "logical cores"),
    ],
)
def test_processor_is_named_with_its_features(cpuinfo: str, start: str, end: str) -> None:
    said = describe_processor(cpuinfo)
    assert said.startswith(start)
    assert said.endswith(end)
    assert not said.startswith(",")


def test_head_of_a_run_names_processor_and_versions(pytestconfig: pytest.Config) -> None:
    lines: list[Any] = pytestconfig.hook.pytest_report_header(
        config=pytestconfig, start_path=pytestconfig.rootpath
    )
    text = str(lines)
    assert "processor: " in text
    assert "torch " in text
    assert "megatron-core " in text
