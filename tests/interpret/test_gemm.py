"""Generated Gemms in the interpreter against the FP64 product of their decoded operands."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest
import torch
from gemms import check

from lpcompile.codegen import emit, gemm_scales
from lpcompile.codegen.source import Sizes
from lpcompile.errors import KernelError
from lpcompile.kernel import parse
from lpcompile.target import find_target

TILE = (32, 32, 32)
SHAPES = [(64, 64, 64), (48, 80, 96), (45, 39, 51)]
KERNELS = [
    "gemm e4m3:row|1 @ e4m3:row|1' -> bf16 + bias",
    "gemm e5m2:tensor|1 @ e4m3:tensor|1' -> f32",
    "gemm int8:row|1 @ int8:row|1' -> f32",
    "gemm int8:tensor|1 @ int8:tensor|1 -> bf16",
    "gemm e4m3:row|0' @ e4m3:row|0 -> bf16",
    "gemm e4m3:1x32:e8m0:up|1~ @ e4m3:1x32:e8m0:up|1~' -> f32",
    "gemm e4m3:row|1~ @ e2m1:1x16:e4m3+f32|1~' -> f16",
    "gemm e4m3:row|1~ @ hp -> bf16",
]
GROUPED = [
    "gemm e4m3:1x128|1 @ e4m3:128x128|1' -> bf16",
    "gemm e4m3:1x128|0' @ e4m3:1x128|0 -> f32",
    "gemm e4m3:1x64|1~ @ e4m3:64x64|1~' -> f32",
]
SCALED = [
    "gemm e4m3:1x32:e8m0:up|1 @ e5m2:1x32:e8m0:up|1' -> f32",
    "gemm e4m3:1x32:e8m0:up|0' @ e4m3:1x32:e8m0:up|0 -> f32",
    "gemm e2m1:1x32:e8m0:matched|1 @ e2m1:1x32:e8m0:quest|1' -> f32",
    "gemm e2m1:1x16:e4m3+f32|1 @ e2m1:16x16:e4m3+f32|1' -> f32",
]


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", KERNELS)
def test_products(text: str, shape: tuple[int, int, int], tma: bool):
    check(text, shape, TILE, tma=tma, persistent=tma)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("shape", [(48, 80, 192), (45, 39, 151)], ids=str)
@pytest.mark.parametrize("text", GROUPED)
def test_scales_that_vary_along_the_contraction(text: str, shape: tuple[int, int, int], tma: bool):
    check(text, shape, TILE, target="sm_90", tma=tma, persistent=tma)


def test_a_tile_across_two_blocks_of_scales():
    check(GROUPED[0], (40, 300, 140), (32, 256, 64), target="sm_90")


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("text", SCALED)
def test_scales_in_the_instruction(text: str, shape: tuple[int, int, int], tma: bool):
    check(text, shape, (32, 32, 64), tma=tma, persistent=tma)


@pytest.mark.parametrize(
    ("text", "target", "reason"),
    [
        ("gemm e4m3:row|1 @ e4m3:row|1' -> bf16", "sm_80", "has no instruction"),
        ("gemm e4m3:row|1 @ hp -> bf16", "sm_90", "codes against plain values"),
        ("gemm e2m1:1x32:e8m0:up|0' @ e2m1:1x32:e8m0:up|1' -> bf16", "sm_100", "packed along the contraction"),
        ("gemm e4m3:row|1 @ e4m3:row|1 -> bf16", "sm_90", "do not fit scales of 1"),
    ],
)
def test_what_is_not_generated_says_why(text: str, target: str, reason: str):
    with pytest.raises(KernelError, match=reason):
        emit(parse(text), Sizes.of(64, 64, 64), find_target(target))


def test_integers_are_exact():
    text = "gemm int8:row|1 @ int8:row|1' -> f32"
    result = check(text, (45, 39, 51), TILE)
    assert torch.equal(result.found, result.reference)


@pytest.mark.parametrize("shape", [(70, 45), (128, 64), (3, 1)])
def test_scales_of_columns_are_turned(shape: tuple[int, int], tmp_path: pathlib.Path) -> None:
    """What Hopper's 1x128 @ 1x128 launches before its product."""
    lines = ["import torch", "import triton", "import triton.language as tl", *gemm_scales.TURN, "", "def turn(a, b_scale, N):"]
    path = tmp_path / "turned.py"
    path.write_text("\n".join([*lines, *(f"    {line}" for line in [*gemm_scales.CALLS, "return b_scales"])]))
    spec = importlib.util.spec_from_file_location("turned", path)
    turned = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(turned)
    scales = torch.rand(shape)
    found = turned.turn(scales, scales, shape[0])
    assert found.is_contiguous() and torch.equal(found, scales.T)
