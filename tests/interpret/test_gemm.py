"""Generated Gemms in the interpreter against the FP64 product of their decoded operands."""

from __future__ import annotations

import pytest
import torch
from gemms import check

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


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", KERNELS)
def test_products(text: str, shape: tuple[int, int, int], tma: bool):
    check(text, shape, TILE, tma=tma, persistent=tma)


def test_integers_are_exact():
    text = "gemm int8:row|1 @ int8:row|1' -> f32"
    result = check(text, (45, 39, 51), TILE)
    assert torch.equal(result.found, result.reference)
