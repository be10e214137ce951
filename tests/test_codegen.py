"""Generated kernels compiled for every target, without a device: the instructions, registers and memory that they take."""

from __future__ import annotations

import cross_compile
import pytest

from lpcompile.codegen import emit
from lpcompile.codegen.gemm_vendor import vendor_schedules
from lpcompile.codegen.source import Sizes
from lpcompile.kernel import GemmKernel, parse
from lpcompile.target import find_target

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


@pytest.mark.parametrize(
    ("right", "sizes", "offered"),
    [
        ("1x128", (256, 64, 1024), ["blockwise"]),
        ("1x128", (1, 64, 1024), []),
        ("1x128", (129, 64, 1024), []),
        ("1x128", (256, 64, 640), ["blockwise"]),
        ("128x128", (256, 64, 1024), ["blockwise"]),
        ("128x128", (256, 64, 640), []),
        ("128x128", (129, 64, 1024), []),
    ],
)
def test_the_librarys_blockwise_product_needs_aligned_scales(right: str, sizes: tuple[int, ...], offered: list[str]) -> None:
    kernel = parse(f"gemm e4m3:1x128|1 @ e4m3:{right}|1' -> bf16")
    assert isinstance(kernel, GemmKernel)
    target = find_target("sm_90")
    found = vendor_schedules(kernel, Sizes.of(*sizes), target)
    assert [schedule.vendor for schedule in found] == offered
    for schedule in found:
        text = emit(kernel, Sizes.of(*sizes), target, schedule).text
        # Scales of squares are read as they are, those of rows in another order.
        assert f"BlockWise{right}\n" in text and ("b_scale.T, recipes[1]" in text) == (right == "128x128")
        assert text.count("clone(") == 2  # one of them in `ready`
    swapped = parse("gemm e4m3:128x128|1 @ e4m3:1x128|1' -> bf16")
    assert isinstance(swapped, GemmKernel) and not vendor_schedules(swapped, Sizes.of(256, 256, 1024), target)
