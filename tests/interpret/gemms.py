"""Operands for a Gemm's text, its generated result, and the FP64 result to compare it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpcompile import fused
from lpcompile.codegen import emit, module
from lpcompile.codegen.source import Schedule, Sizes
from lpcompile.kernel import GemmKernel, Output, parse
from lpcompile.product import Product
from lpcompile.recipe import DotOperand
from lpcompile.target import find_target

# Relative to the norm of the result: one rounding to the dtype, and FP32 sums for f32.
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}
SEED = torch.tensor([1234567])


def operand(side: DotOperand, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """The tensors of one side whose values lie as `shape` in memory."""
    x = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator).exp()
    if side.cast is None:
        return [x.to(dtype)]
    return fused._quantized(x.to(torch.bfloat16), Output(side.cast, decoded=side.decoded), SEED, 1, (0, 0))


def inputs(kernel: GemmKernel, m: int, n: int, k: int, seed: int = 0) -> list[Tensor]:
    """Random inputs of a Gemm."""
    generator = torch.Generator().manual_seed(seed)
    left = operand(kernel.dot.left, (k, m) if kernel.dot.left.transposed else (m, k), kernel.out, generator)
    right = operand(kernel.dot.right, (n, k) if kernel.dot.right.transposed else (k, n), kernel.out, generator)
    bias = [torch.randn(n, generator=generator).to(kernel.out)] if kernel.bias else []
    return [*left, *right, *bias]


def exact(given: Sequence[Tensor], kernel: GemmKernel, m: int, n: int) -> Tensor:
    """The FP64 product of the decoded operands, times all scales, plus the bias."""
    parts = fused.GemmInputs.of(given, kernel)
    p = Product.of(parts.left, parts.right, kernel.dot, (m, n))
    a, b = wide(p.left, p.k, p.m), wide(p.right, p.k, p.n)
    found = a @ b
    return found if parts.bias is None else found + parts.bias.double()


def wide(side, k: int, outer: int) -> Tensor:
    """FP64 values of an operand with all its scales."""
    values = side.decoded(k, outer, scaled=not side.deferred and side.quant is not None and not side.operand.decoded).double()
    factor = side.factor(outer)
    return values if factor is None else values * factor.double()


@dataclass(frozen=True)
class Result:
    """What the kernel gave, and what the reference says."""

    found: Tensor
    reference: Tensor


def error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to the expected norm."""
    return float((found.double() - expected).norm() / expected.norm())


def check(
    text: str, shape: tuple[int, int, int], tile: tuple[int, int, int], target: str = "sm_100", **schedule: int
) -> Result:
    """Runs a Gemm and asserts that it is right, and that this check sees zeros and permutations."""
    kernel = parse(text)
    assert isinstance(kernel, GemmKernel)
    m, n, k = shape
    given = inputs(kernel, m, n, k)
    source = emit(kernel, Sizes.of(m, n, k), find_target(target), Schedule(tile, **schedule))
    (found,) = module.load(source).launch(given, (m, n))
    (reference,) = fused.fused_reference(given, text, (m, n))
    assert found.dtype == kernel.result and found.shape == reference.shape
    expected, tolerance = exact(given, kernel, m, n), TOLERANCE[kernel.out]
    assert error(found, expected) < tolerance
    for wrong in (found * 0, found.roll(1, 0), found.roll(1, 1)):
        assert error(wrong, expected) > 2 * tolerance
    return Result(found, reference)
