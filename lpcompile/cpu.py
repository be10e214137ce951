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
from lpcompile.reference import Quantized, decode, dequantize, from_codes, quantize, quantize_blocks, scaled_blocks

# A user's pass is meant for the user's graph, not for our kernels.
_OPTIONS: dict[str, Any] = {"joint_custom_pre_pass": None}
# Below this many elements a compiled kernel's guards cost more than the work.
_SMALL = 4096


class _Kernel:
    """`fn` compiled with dynamic shapes: one kernel for each `spec`, shared by all layers.

    fixed: axes that are constants of the kernel (those of a block); all others vary between layers.

    Dynamo keeps what it compiled by code object, and equal code objects are one to it: two closures of one function would
    share a kernel. A name of its own, made from the spec, keeps them apart.
    """

    def __init__(self, fn: Callable[..., Any], *spec: object, fixed: tuple[int, ...] = ()) -> None:
        name = re.sub(r"\W+", "_", "_".join(str(s) for s in (fn.__qualname__.partition(".")[0], *spec))).strip("_")
        code = fn.__code__.replace(co_name=name)
        own = types.FunctionType(code, fn.__globals__, name, fn.__defaults__, fn.__closure__)
        self.run: Callable[..., Any] = torch.compile(own, fullgraph=True, options=_OPTIONS)
        self.fixed = fixed
        self.seen: set[tuple[torch.Size | None, ...]] = set()

    def __call__(self, *args: Any) -> Any:
        tensors = [value for value in args if isinstance(value, Tensor)]
        shapes = tuple(tensor.shape for tensor in tensors)
        # Marks matter to a compilation only, and a compilation needs shapes that were not there before.
        if shapes not in self.seen:
            self.seen.add(shapes)
            for tensor in tensors:
                for dim in range(tensor.dim()):
                    if dim not in self.fixed:
                        torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return self.run(*args)


def _block_axes(cast: Cast) -> tuple[int, ...]:
    """The axes of [B, R', r, C', c] that are constants: a block's own where it has a size, the count where it has none."""
    rows, cols = cast.quant.block.along(cast.axis)
    return (2 if rows else 1, 4 if cols else 3)


@functools.cache
def _quantize_kernel(cast: Cast) -> Callable[[Tensor, Quant, Tensor | None], list[Tensor]]:
    def kernel(blocks: Tensor, noise: Tensor | None) -> list[Tensor]:
        return quantize_blocks(blocks, cast.quant, noise)

    run = _Kernel(kernel, cast, fixed=_block_axes(cast))
    return lambda blocks, _, noise: run(blocks, noise)


def run_quantize(x: Tensor, cast: Cast, noise: Tensor | None = None) -> list[Tensor]:
    """The parts of one quantisation of a CPU tensor."""
    if x.numel() < _SMALL or x.dtype == torch.float64:
        return quantize(x, cast.quant, cast.axis, noise).parts()
    return quantize(x.contiguous(), cast.quant, cast.axis, noise, _quantize_kernel(cast)).parts()


def run_apply_mask(fn: Callable[[Tensor, Tensor, bool], Tensor], x: Tensor, bits: Tensor, transposed: bool) -> Tensor:
    """`apply_mask`, compiled."""
    masked: Tensor = (fn if x.numel() < _SMALL else _mask_kernel(fn, transposed))(x, bits, transposed)
    return masked


@functools.cache
def _mask_kernel(fn: Callable[[Tensor, Tensor, bool], Tensor], transposed: bool) -> _Kernel:
    return _Kernel(fn, transposed)


@functools.cache
def _decode_kernel(cast: Cast, scaled: bool, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Quant], Tensor]:
    def kernel(codes: Tensor, scale: Tensor) -> Tensor:
        values = scaled_blocks(codes, scale, cast.quant) if scaled else from_codes(codes, cast.quant.elem)
        return values.to(dtype)

    run = _Kernel(kernel, cast, scaled, dtype, fixed=_block_axes(cast))
    return lambda codes, scale, _: run(codes, scale)


def _form(tensor: Tensor | None) -> tuple[object, ...]:
    """What a compiled kernel is made for: the dtype, and the axes along which the tensor is one number or many."""
    return () if tensor is None else (tensor.dtype, *(size == 1 for size in tensor.shape))


@functools.cache
def _epilogue_kernel(*forms: object) -> _Kernel:
    """One for each form: Dynamo gives up where one function has been compiled for eight."""
    return _Kernel(epilogue, *forms)


def run_dequantize(parts: Sequence[Tensor], cast: Cast, cols: int, dtype: torch.dtype) -> Tensor:
    """`reference.dequantize` of a CPU tensor's parts."""
    q = Quantized.of(list(parts), cast.quant)
    if q.codes.numel() < _SMALL or q.outer is not None:
        return dequantize(q, cast.quant, cast.axis, cols, dtype)
    return decode(q.codes, q.scale, cast.quant, cast.axis, cols, _decode_kernel(cast, True, dtype))


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
    cols = k if side.k_axis == 1 else outer
    kernel = _decode_kernel(cast, scaled, dtype)
    return side.orient(decode(side.parts[0], side.parts[1], cast.quant, cast.axis, cols, kernel))


def _exact_in_bf16(quant: Quant | None) -> bool:
    """True where every code is a bf16 number (a plain operand of a bf16 product is one already)."""
    return quant is None or quant.elem.man <= 7


def _finish(acc: Tensor, left: Tensor | None, right: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if left is None and right is None and bias is None:
        return acc.to(dtype)
    if acc.numel() < _SMALL:
        return epilogue(acc, left, right, bias, dtype)
    kernel = _epilogue_kernel(*map(_form, (acc, left, right, bias)), dtype)
    finished: Tensor = kernel(acc, left, right, bias, dtype)
    return finished


def _byte_integers(p: Product) -> bool:
    return p.integer and all(s.parts[0].dim() == 2 and s.parts[0].dtype == torch.int8 for s in (p.left, p.right))


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """The exact product of int8 matrices as int32.

    Without an instruction for it (VNNI) torch takes longer than for one in FP64, where each sum is as exact: 640 ms to 34 for
    2048x384x1024 on two cores with AVX2. The operands take eight times their memory meanwhile.
    """
    return torch._int_mm(a, b) if torch.cpu._is_vnni_supported() else (a.double() @ b.double()).to(torch.int32)


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
        acc = _int_mm(p.left.orient(left[0]), p.right.orient(right[0]))
        return _finish(acc, p.left.factor(p.m), p.right.factor(p.n), bias, dtype)
    narrow = dtype == torch.bfloat16 and not p.group and all(_exact_in_bf16(s.quant) for s in (p.left, p.right))
    compute = torch.bfloat16 if narrow else torch.float32
    # An arbitrary FP32 scale that varies along K is applied to the FP32 operand: the same sum in another order.
    folded = [_foldable(s, compute) or s.grouped for s in (p.left, p.right)]
    a = _operand(p.left, p.k, p.m, folded[0], compute)
    b = _operand(p.right, p.k, p.n, folded[1], compute)
    factors = [
        (side.part("outer") if side.quant is not None and side.quant.has_outer else None) if fold else side.factor(outer)
        for side, fold, outer in zip((p.left, p.right), folded, (p.m, p.n), strict=True)
    ]
    if bias is not None and factors == [None, None] and a.dim() == 2 and bias.dtype == a.dtype == dtype:
        return torch.addmm(bias, a, b)  # one rounding, after the bias
    return _finish(a @ b, factors[0], factors[1], bias, dtype)
