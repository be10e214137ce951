"""Generated kernels compiled for every target, without a device: the instructions, registers and memory that they take."""

from __future__ import annotations

import cross_compile
import pytest

TARGETS = cross_compile.TARGETS
# All products on Hopper and Blackwell; elsewhere what is not the same text once more.
PRODUCTS = {
    "sm_80": ("fp8 row", "deepseek", "int8 row"),
    "sm_89": ("fp8 tensor", "deepseek dW", "nvfp4"),
    "sm_120": ("fp8 row", "int8 row", "mxfp8", "mxfp4 undone", "nvfp4"),
}


def cases() -> list[tuple[str, str, str]]:
    """Products, and each other kernel on one target in turn (the whole table: benchmarks/cross_compile.py)."""
    found = [("gemm", name, target) for target in TARGETS for name in PRODUCTS.get(target, tuple(cross_compile.GEMMS))]
    others = [(family, name) for family in ("cast", "requant", "decode") for name in cross_compile.texts(family, "sm_90")]
    return found + [(*each, TARGETS[(2 + index) % len(TARGETS)]) for index, each in enumerate(others)]


@pytest.mark.parametrize(("family", "name", "target"), cases(), ids=["-".join(each) for each in cases()])
def test_compiles_as_designed(family: str, name: str, target: str):
    """The expected tensor-core instruction and no other; no spills; memory that the target has; TMA where there is any."""
    for row in cross_compile.rows(family, name, target):
        assert row.faults == (), f"{row.family} {row.name} on {row.target}"
        assert row.compiled is not None and 0 < row.compiled.registers <= 255
