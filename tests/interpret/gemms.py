"""Operands for a Gemm's text, its generated result, and the FP64 result to compare it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpcompile import fused, reference
from lpcompile.codegen import emit, module
from lpcompile.codegen.source import Schedule, Sizes
from lpcompile.kernel import GemmKernel, Output, parse
from lpcompile.product import Product
from lpcompile.recipe import DotOperand
from lpcompile.target import find_target

# Relative to the norm of the result: one rounding to the dtype, and FP32 sums for f32.
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}
SEED = torch.tensor([1234567])
SPINS = (3, 5)


def operand(side: DotOperand, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """The tensors of one side whose values lie as `shape` in memory."""
    x = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator).exp()
    if side.cast is None:
        return [x.to(dtype)]
    return fused._quantized(x.to(torch.bfloat16), Output(side.cast, decoded=side.decoded), SEED, 1, (0, 0))


def inputs(kernel: GemmKernel, m: int, n: int, k: int, seed: int = 0) -> list[Tensor]:
    """Random inputs of a Gemm whose result is [m, n]."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = fused._product_size(kernel, (m, n))
    left = operand(kernel.dot.left, (k, rows) if kernel.dot.left.transposed else (rows, k), kernel.out, generator)
    right = operand(kernel.dot.right, (cols, k) if kernel.dot.right.transposed else (k, cols), kernel.out, generator)
    found = [*left, *right]
    if kernel.bias:
        found.append(torch.randn(cols, generator=generator).to(kernel.out))
    if kernel.mask:
        bits = torch.rand((cols, rows) if kernel.mask_transposed else (rows, cols), generator=generator) < 0.7
        found.append(reference.pack_bits(bits.to(torch.uint8)))
    for each in kernel.then.inputs if kernel.then is not None else ():
        shape = {"r": (m,), "c": (n,)}.get(each.vector, (m, n))
        found.append(torch.randn(shape, generator=generator).to(each.dtype))
    return found


def exact(given: Sequence[Tensor], kernel: GemmKernel, m: int, n: int) -> Tensor:
    """The FP64 product of the decoded operands, times all scales, plus the bias."""
    parts = fused.GemmInputs.of(given, kernel)
    p = Product.of(parts.left, parts.right, kernel.dot, (m, n))
    a, b = wide(p.left, p.k, p.m), wide(p.right, p.k, p.n)
    found = a @ b
    return found if parts.bias is None else found + parts.bias.double()


def wide(side, k: int, outer: int) -> Tensor:
    """FP64 values of an operand with all its scales."""
    decoded = side.operand.decoded
    values = side.decoded(k, outer, scaled=not side.deferred and side.quant is not None and not decoded).double()
    if decoded and side.grouped:
        scale = side.k_scale().double()
        for dim, size in ((-2, values.shape[-2]), (-1, values.shape[-1])):
            block = side.k_block() if (dim == -1) == side.left else side.outer_block()
            scale = scale.repeat_interleave(block, dim).narrow(dim, 0, size)
        values = values * scale
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


Shape = tuple[int, int, int]


def run(
    text: str, shape: Shape, tile: Shape, target: str = "sm_100", **schedule: int
) -> tuple[GemmKernel, list[Tensor], Result]:
    """(kernel, inputs, what the generated module gives and what the reference gives)."""
    kernel = parse(text)
    assert isinstance(kernel, GemmKernel)
    m, n, k = shape
    given = inputs(kernel, m, n, k)
    source = emit(kernel, Sizes.of(m, n, k), find_target(target), Schedule(tile, **schedule))
    # Memory that nothing was written to shows.
    (found,) = module.load(source).launch(given, (m, n), SEED, (), SPINS)
    (expected,) = fused.fused_reference(given, text, (m, n), SEED, (), SPINS)
    assert found.dtype == kernel.result and found.shape == expected.shape
    return kernel, given, Result(found, expected)


def separates(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Asserts that `found` is within the tolerance and that zeros and permutations are not."""
    assert error(found, expected) < tolerance
    for wrong in (found * 0, found.roll(1, 0), found.roll(1, 1)):
        assert error(wrong, expected) > 2 * tolerance


def check(text: str, shape: Shape, tile: tuple[int, ...], target: str = "sm_100", **schedule) -> Result:
    """A product against FP64."""
    kernel, given, result = run(text, shape, tile, target, **schedule)
    separates(result.found, exact(given, kernel, *shape[:2]), TOLERANCE[kernel.out])
    return result


def check_followed(text: str, shape: Shape, tile: Shape, target: str = "sm_100", **schedule: int) -> Result:
    """A product and what follows it against the reference: each step may round to a neighbour."""
    kernel, _, result = run(text, shape, tile, target, **schedule)
    separates(result.found, result.reference.double(), 2 * TOLERANCE[kernel.out])
    return result
