"""Generated kernels compiled for every target, without a device: the instructions, registers and memory that they take."""

from __future__ import annotations

import cross_compile
import pytest

TARGETS = cross_compile.TARGETS


def cases() -> list[tuple[str, str, str]]:
    """All products everywhere; of the rest, each kernel on a Hopper and on one more target in turn (all: the benchmark)."""
    found = [("gemm", name, target) for target in TARGETS for name in cross_compile.GEMMS]
    others = [target for target in TARGETS if target != "sm_90"]
    for family in ("cast", "requant", "decode"):
        for index, name in enumerate(cross_compile.texts(family, "sm_90")):
            found += [(family, name, "sm_90"), (family, name, others[index % len(others)])]
    return found


@pytest.mark.parametrize(("family", "name", "target"), cases(), ids=["-".join(each) for each in cases()])
def test_compiles_as_designed(family: str, name: str, target: str):
    """The expected tensor-core instruction and no other; no spills; memory that the target has; TMA where there is any."""
    for row in cross_compile.rows(family, name, target):
        assert row.faults == (), f"{row.family} {row.name} on {row.target}"
        assert row.compiled is not None and 0 < row.compiled.registers <= 255
