"""The ops on a CPU: compiled quantisation, `torch._int_mm` for INT8, an exact bf16 decode for the float formats.

Each Cast is compiled once with dynamic shapes and shared by all layers; the compiled kernels are the reference functions
themselves, so codes and scales are bitwise the reference's.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lpcompile.formats import Quant
from lpcompile.product import Product, Side, empty_product, epilogue
from lpcompile.recipe import Cast, Dot
from lpcompile.reference import decode, from_codes, quantize, quantize_blocks, scaled_blocks

# A user's pass is meant for the user's graph, not for our kernels.
_OPTIONS: dict[str, Any] = {"joint_custom_pre_pass": None}
# Below this many elements a compiled kernel's guards cost more than the work.
_SMALL = 4096


def _compiled(fn: Callable[..., Any], *spec: object) -> Callable[..., Any]:
    """`fn` compiled with dynamic shapes, one kernel for each `spec`.

    Dynamo keeps what it compiled by code object, and equal code objects are one to it: two closures of one function would
    share a kernel. A name of its own, made from the spec, keeps them apart.
    """
    name = re.sub(r"\W+", "_", "_".join(str(s) for s in (fn.__qualname__.partition(".")[0], *spec))).strip("_")
    code = fn.__code__.replace(co_name=name)
    own = types.FunctionType(code, fn.__globals__, name, fn.__defaults__, fn.__closure__)
    own.__kwdefaults__ = fn.__kwdefaults__
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True, options=_OPTIONS)
    return compiled


def _dynamic(blocks: Tensor, quant: Quant, axis: int) -> None:
    """Marks the axes of [B, R', r, C', c] that vary between layers; those of the block itself are constants."""
    rows, cols = quant.block.along(axis)
    for dim, varies in ((0, True), (1, rows != 0), (2, rows == 0), (3, cols != 0), (4, cols == 0)):
        if varies:
            torch._dynamo.maybe_mark_dynamic(blocks, dim)


@functools.cache
def _quantize_kernel(cast: Cast) -> Callable[..., list[Tensor]]:
    def kernel(blocks: Tensor, noise: Tensor | None) -> list[Tensor]:
        return quantize_blocks(blocks, cast.quant, noise)

    return _compiled(kernel, cast)


def run_quantize(x: Tensor, cast: Cast, noise: Tensor | None = None) -> list[Tensor]:
    """The parts of one quantisation of a CPU tensor."""
    if x.numel() < _SMALL or x.dtype == torch.float64:
        return quantize(x, cast.quant, cast.axis, noise).parts()

    def kernel(blocks: Tensor, quant: Quant, noise: Tensor | None) -> list[Tensor]:
        for tensor in (blocks, noise):
            if tensor is not None:
                _dynamic(tensor, quant, cast.axis)
        return _quantize_kernel(cast)(blocks, noise)

    return quantize(x.contiguous(), cast.quant, cast.axis, noise, kernel).parts()


@functools.cache
def _noise_kernel(draw: Callable[[int, Tensor], Tensor]) -> Callable[..., Tensor]:
    return _compiled(draw, draw.__name__)


def run_noise(draw: Callable[[int, Tensor], Tensor], count: int, key: Tensor) -> Tensor:
    """`philox.uniform` or `philox.uniform8`, compiled."""
    return draw(count, key) if count < _SMALL else _noise_kernel(draw)(count, key)


@functools.cache
def _decode_kernel(cast: Cast, scaled: bool, dtype: torch.dtype) -> Callable[..., Tensor]:
    def kernel(codes: Tensor, scale: Tensor) -> Tensor:
        values = scaled_blocks(codes, scale, cast.quant) if scaled else from_codes(codes, cast.quant.elem)
        return values.to(dtype)

    return _compiled(kernel, cast, scaled, dtype)


@functools.cache
def _epilogue_kernel() -> Callable[..., Tensor]:
    return _compiled(epilogue)


def _foldable(side: Side, dtype: torch.dtype) -> bool:
    """True where code times block scale is exact in `dtype`, so that the decoded operand can carry its scale."""
    quant = side.quant
    if quant is None:
        return False
    if quant.pow2:
        return True
    return quant.outer is not None and quant.elem.man + 1 + quant.scale.man + 1 <= (8 if dtype == torch.bfloat16 else 24)


def _operand(side: Side, k: int, outer: int, scaled: bool, dtype: torch.dtype) -> Tensor:
    """The decoded operand as a plain matrix of `dtype`."""
    cast = side.operand.cast
    if cast is None:
        return side.orient(side.parts[0].to(dtype))
    if k * outer < _SMALL:
        return side.decoded(k, outer, scaled).to(dtype)

    def kernel(codes: Tensor, scale: Tensor, quant: Quant) -> Tensor:
        _dynamic(codes, quant, cast.axis)
        _dynamic(scale, quant, cast.axis)
        return _decode_kernel(cast, scaled, dtype)(codes, scale)

    cols = k if side.k_axis == 1 else outer
    return side.orient(decode(side.parts[0], side.parts[1], cast.quant, cast.axis, cols, kernel))


def _exact_in_bf16(quant: Quant | None) -> bool:
    """True where every code is a bf16 number (a plain operand of a bf16 product is one already)."""
    return quant is None or quant.elem.man <= 7


def _finish(acc: Tensor, left: Tensor | None, right: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if left is None and right is None and bias is None:
        return acc.to(dtype)
    if acc.numel() < _SMALL:
        return epilogue(acc, left, right, bias, dtype)
    for tensor in (acc, left, right, bias):
        if tensor is not None:
            for dim in range(tensor.dim()):
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return _epilogue_kernel()(acc, left, right, bias, dtype)


def _byte_integers(p: Product) -> bool:
    return p.integer and all(s.parts[0].dim() == 2 and s.parts[0].dtype == torch.int8 for s in (p.left, p.right))


def run_scaled_mm(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    bias: Tensor | None,
    dot: Dot,
    size: Sequence[int] | None,
    dtype: torch.dtype,
) -> Tensor:
    """`product.scaled_mm` on CPU tensors: the same codes and scales, the FP32 sums in another order.

    For a bf16 result the product itself is rounded to bf16 before scales that could not be folded are applied, so that a
    result may be one bf16 ulp from the reference's.
    """
    p = Product.of(left, right, dot, size)
    if 0 in (p.m, p.n, p.k):
        return empty_product(p, bias, dtype)
    if _byte_integers(p):
        acc = torch._int_mm(p.left.orient(left[0]), p.right.orient(right[0]))
        return _finish(acc, p.left.factor(p.m), p.right.factor(p.n), bias, dtype)
    narrow = dtype == torch.bfloat16 and not p.group and all(_exact_in_bf16(s.quant) for s in (p.left, p.right))
    compute = torch.bfloat16 if narrow else torch.float32
    # An arbitrary FP32 scale that varies along K is applied to the FP32 operand: the same sum in another order.
    folded = [_foldable(s, compute) or s.grouped for s in (p.left, p.right)]
    a = _operand(p.left, p.k, p.m, folded[0], compute)
    b = _operand(p.right, p.k, p.n, folded[1], compute)
    factors = [
        (side.parts[2] if side.quant is not None and side.quant.has_outer else None) if fold else side.factor(outer)
        for side, fold, outer in zip((p.left, p.right), folded, (p.m, p.n), strict=True)
    ]
    if bias is not None and factors == [None, None] and a.dim() == 2 and bias.dtype == a.dtype == dtype:
        return torch.addmm(bias, a, b)  # one rounding, after the bias
    return _finish(a @ b, factors[0], factors[1], bias, dtype)
