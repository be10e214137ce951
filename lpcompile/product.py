"""The meaning of a scaled matrix product: which scales can wait for the epilogue, which must be applied along K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpcompile.formats import Int, Quant
from lpcompile.recipe import Cast, Dot, DotOperand
from lpcompile.reference import code_values, decode, decode_scale


@dataclass(frozen=True)
class Side:
    """One operand of a product, oriented [outer, K] (left) or [K, outer] (right), ready to be decoded.

    parts: the tensors of the cast in storage order, or the plain tensor. left: which side it is.
    """

    parts: Sequence[Tensor]
    operand: DotOperand
    left: bool

    @property
    def quant(self) -> Quant | None:
        return self.operand.cast.quant if self.operand.cast else None

    @property
    def k_axis(self) -> int:
        """The storage axis that is the contraction."""
        return (1 if self.left else 0) ^ int(self.operand.transposed)

    def part(self, name: str) -> Tensor:
        """The tensor that a name of `DotOperand.parts` stands for."""
        return self.parts[self.operand.parts.index(name)]

    def stored_size(self, axis: int) -> tuple[int, bool]:
        """(size along a storage axis, whether it may be one too long because codes are packed in pairs)."""
        codes = self.parts[0]
        if axis == 1 and self.quant is not None and self.quant.packed and not self.operand.decoded:
            return codes.shape[-1] * 2, True
        return codes.shape[-2 + axis], False

    def orient(self, stored: Tensor) -> Tensor:
        return stored.mT if self.operand.transposed else stored

    def decoded(self, k: int, outer: int, scaled: bool) -> Tensor:
        """FP32 values [outer, K] or [K, outer]; times the block scale where `scaled`, never times the outer scale."""
        if self.quant is None or self.operand.decoded:
            return self.orient(self.parts[0].to(torch.float32))
        cols = k if self.k_axis == 1 else outer
        if not scaled:
            return self.orient(code_values(self.parts[0], self.quant, cols))
        assert self.operand.cast is not None
        return self.orient(decode(self.parts[0], self.parts[1], self.quant, self.operand.cast.axis, cols))

    def k_scale(self) -> Tensor:
        """FP32 block scales oriented like the operand, [outer blocks, K blocks] or [K blocks, outer blocks]."""
        return self.orient(decode_scale(self.part("scale")))

    def outer_block(self) -> int:
        """Elements of the outer axis that share a scale (0: all)."""
        assert self.operand.cast is not None
        return self.operand.cast.quant.block.along(self.operand.cast.axis)[1 - self.k_axis]

    def k_block(self) -> int:
        """Elements of the contraction that share a scale (0: all, or no scale at all)."""
        if self.operand.cast is None:
            return 0
        return self.operand.cast.quant.block.along(self.operand.cast.axis)[self.k_axis]

    @property
    def carried(self) -> bool:
        """True where the values bear their block scales already."""
        return self.operand.decoded and "scale" not in self.operand.parts

    @property
    def deferred(self) -> bool:
        """True where the block scale is constant along K, so that it can wait for the epilogue."""
        return self.quant is not None and self.k_block() == 0 and not self.carried

    @property
    def grouped(self) -> bool:
        """True where the scale varies along K and is an arbitrary FP32 number: partial products are scaled in FP32."""
        return self.quant is not None and self.k_block() != 0 and not self.quant.pow2 and self.quant.outer is None

    def factor(self, outer: int) -> Tensor | None:
        """What the epilogue multiplies with: [outer, 1], [1, outer] or [1, 1] FP32, or None."""
        if self.quant is None:
            return None
        factor: Tensor | None = None
        if self.deferred:
            factor = _repeat(self.k_scale(), self.outer_block(), outer, -2 if self.left else -1)
        if self.quant.has_outer:
            factor = self.part("outer") if factor is None else factor * self.part("outer")
        return factor


def _repeat(scale: Tensor, block: int, size: int, dim: int) -> Tensor:
    if block <= 1:
        return scale
    return scale.repeat_interleave(block, dim).narrow(dim, 0, size)


@dataclass(frozen=True)
class Product:
    """A scaled product with its sizes resolved. See `scaled_mm`."""

    left: Side
    right: Side
    m: int
    n: int
    k: int

    @staticmethod
    def of(left: Sequence[Tensor], right: Sequence[Tensor], dot: Dot, size: Sequence[int] | None) -> Product:
        a, b = Side(left, dot.left, True), Side(right, dot.right, False)
        (ka, a_loose), (kb, b_loose) = a.stored_size(a.k_axis), b.stored_size(b.k_axis)
        k = kb if a_loose and not b_loose else ka
        if size is not None:
            m, n = size
        else:
            m, n = a.stored_size(1 - a.k_axis)[0], b.stored_size(1 - b.k_axis)[0]
        return Product(a, b, m, n, k)

    @property
    def integer(self) -> bool:
        """True where both operands are integer codes whose scales wait for the epilogue."""
        return all(
            s.deferred and s.quant is not None and isinstance(s.quant.elem, Int) and not s.operand.decoded
            for s in (self.left, self.right)
        )

    @property
    def group(self) -> int:
        """Length of the K groups whose partial products are scaled in FP32; 0 where there are none."""
        return min((s.k_block() for s in (self.left, self.right) if s.grouped), default=0)

    def group_factor(self, side: Side, index: int) -> Tensor:
        """FP32 factor of one K group: [outer, 1] or [1, outer]."""
        if not side.grouped:
            return torch.ones(1, 1, device=side.parts[0].device)
        block, dim = index * self.group // side.k_block(), -1 if side.left else -2
        scale = side.k_scale().narrow(dim, block, 1)
        return _repeat(scale, side.outer_block(), self.m if side.left else self.n, -2 if side.left else -1)


def epilogue(acc: Tensor, left: Tensor | None, right: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """acc * left * right + bias in FP32, in that order, rounded once to `dtype`."""
    out = acc.to(torch.float32)
    out = out if left is None else out * left
    out = out if right is None else out * right
    out = out if bias is None else out + bias.to(torch.float32)
    return out.to(dtype)


def scaled_mm(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    bias: Tensor | None,
    dot: Dot,
    size: Sequence[int] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The product of two quantised (or plain) operands, [..., M, N]: the reference that every kernel must match.

    Products are exact; sums are FP32 (integers: exact). Power-of-two and two-level block scales are folded into the operands
    (exact); arbitrary FP32 block scales multiply the partial product of each K group, which is then added in FP32
    (DeepSeek-V3); scales that are constant along K, outer scales and the bias wait for the FP32 epilogue.
    size: (M, N), needed only where an outer axis is packed in pairs.
    """
    p = Product.of(left, right, dot, size)
    if 0 in (p.m, p.n, p.k):
        return empty_product(p, bias, dtype)
    a = p.left.decoded(p.k, p.m, scaled=not (p.left.deferred or p.left.grouped))
    b = p.right.decoded(p.k, p.n, scaled=not (p.right.deferred or p.right.grouped))
    if p.integer:
        acc = (a.double() @ b.double()).float()
    elif p.group:
        acc = torch.zeros(*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), p.m, p.n, device=a.device)
        for index in range(-(-p.k // p.group)):
            span = slice(index * p.group, (index + 1) * p.group)
            partial = a[..., :, span] @ b[..., span, :]
            acc = acc + partial * (p.group_factor(p.left, index) * p.group_factor(p.right, index))
    else:
        acc = a @ b
    return epilogue(acc, p.left.factor(p.m), p.right.factor(p.n), bias, dtype)


def empty_product(p: Product, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The result where some axis is empty: the bias, or zeros."""
    first = p.left.parts[0]
    batch = torch.broadcast_shapes(first.shape[:-2], p.right.parts[0].shape[:-2])
    return epilogue(torch.zeros(*batch, p.m, p.n, device=first.device), None, None, bias, dtype)


def casts(dot: Dot) -> tuple[Cast, ...]:
    """The casts of both sides."""
    return tuple(side.cast for side in (dot.left, dot.right) if side.cast is not None)
