"""The rewrite: each converted GEMM becomes a scaled product of two quantised operands.

    y = mm(x, wT)        ->   xq = quantize(x, ..);  wq = quantize(w, ..);  y = scaled_mm(xq, wq)
    y = addmm(b, x, wT)  ->   the same with the bias added in FP32 before the one rounding of the output

An operand is quantised once per distinct Cast, whoever reads it: q, k and v share one, and so do forward and backward
where the Cast is the same. What wgrad needs of the input is quantised in the forward pass, so that codes are saved.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from lpcompile.joint import Operand, gemm_bias, gemm_operands, insert_call
from lpcompile.pipeline import Decision, Plan, draw_seed
from lpcompile.recipe import Cast, Dot, DotOperand, Role, Rotation

assert __name__ == "lpcompile.passes.quantize", "import it as lpcompile.passes, not as passes"


def quantize(graph: Graph, plan: Plan) -> None:
    """Rewrites every converted GEMM, in graph order, so that a shared cast stands before its first reader."""
    by_node = plan.converted()
    rewriter = _Rewriter(graph, plan)
    for node in [n for n in graph.nodes if n in by_node]:
        rewriter.rewrite(node, by_node[node])
    graph.eliminate_dead_code()


@dataclass(frozen=True)
class _Source:
    """What an operand is quantised from: the tensor before its rotations, and those with the numbers of their signs."""

    base: Node
    rotations: tuple[Rotation | None, Rotation | None]
    spins: tuple[int, int]

    @staticmethod
    def of(node: Node) -> _Source:
        """Looks behind the rotations of an operand, which will ride inside its quantisation."""
        rotations: tuple[Rotation | None, Rotation | None] = (None, None)
        spins = [0, 0]
        while node.target is torch.ops.lowprec.hadamard.default and node.args[3] is None:
            source, axis, text, _, *drawn = node.args
            assert isinstance(source, Node) and isinstance(axis, int)
            rotations = _only(rotations, 1 - axis, Rotation.parse(str(text)))
            spins[axis] = drawn[1] if drawn else 0  # type: ignore[assignment]
            node = source
        return _Source(node, rotations, (spins[0], spins[1]))


def _only(
    rotations: tuple[Rotation | None, Rotation | None], axis: int, other: Rotation | None
) -> tuple[Rotation | None, Rotation | None]:
    """The rotation along `axis` as it is, that along the other axis replaced."""
    return (rotations[0], other) if axis == 0 else (other, rotations[1])


@dataclass(frozen=True)
class _Made:
    """The parts of one quantisation. contraction: the storage axis that fprop contracts."""

    parts: list[Node]
    cast: Cast
    contraction: int = 1


class _Rewriter:
    """Holds the casts made so far, by what they were made from."""

    def __init__(self, graph: Graph, plan: Plan) -> None:
        self.graph, self.plan = graph, plan
        self.casts: dict[tuple[Any, ...], _Made] = {}
        self.fprop: dict[tuple[str, Node], _Made] = {}  # by site and tensor

    def rewrite(self, node: Node, decision: Decision) -> None:
        """Replaces one GEMM by a scaled product, behind a clip mask where fprop made one."""
        site = decision.site
        assert site is not None
        sides = [self._side(value, position, node, decision) for position, value in enumerate(gemm_operands(node))]
        (left, left_operand), (right, right_operand) = sides
        args = (
            left,
            right,
            gemm_bias(node),
            str(Dot(left_operand, right_operand)),
            self._size(node, left_operand, right_operand),
            node.meta["val"].dtype,
        )
        product = insert_call(self.graph, node, torch.ops.lowprec.scaled_mm.default, args)
        product.meta["lowprec"] = {"site": site.key, "role": str(decision.role)}
        result = self._masked(product, node, decision)
        node.replace_all_uses_with(result)
        self.plan.replaced(node, result)

    def _side(self, value: Node, position: int, node: Node, decision: Decision) -> tuple[list[Node], DotOperand]:
        """The parts of one operand, and how the product reads them."""
        gemm, site = decision.gemm, decision.site
        assert gemm is not None and site is not None
        operand = Operand.of(value)
        source = _Source.of(operand.node)
        is_b = decision.is_b(source.base)
        quant = gemm.b if is_b else gemm.a
        if quant is None:
            return [operand.node], DotOperand(None, operand.transposed)
        # The contraction is the left operand's last axis and the right one's first, in storage order.
        contraction = (1 - position) ^ int(operand.transposed)
        # The input's copy for wgrad belongs to the forward pass: its codes are saved, not the tensor.
        anchor = site.nodes[Role.FPROP] if source.base is site.x.node else node
        codes = self._codes(source, decision) if is_b and gemm.codes else None
        if codes is None:
            cast = Cast(quant, contraction, source.rotations)
            made = self._quantized(source, cast, anchor, site.key)
        else:
            cast = Cast(quant, contraction, _only(source.rotations, contraction, None))
            made = self._requantized(codes, source, cast, node, site.key)
        if decision.role is Role.FPROP:
            self.fprop[site.key, source.base] = replace(made, contraction=contraction)
        decision.casts["b" if is_b else "a"] = f"{source.base.name}|{cast}"
        return made.parts, DotOperand(cast, operand.transposed)

    def _masked(self, product: Node, node: Node, decision: Decision) -> Node:
        """Behind the clip mask that fprop's quantisation of the same tensor made: of x for dgrad, of w for wgrad."""
        gemm, site = decision.gemm, decision.site
        assert gemm is not None and site is not None
        wanted = {Role.DGRAD: site.x, Role.WGRAD: site.w}.get(decision.role or Role.FPROP)
        made = self.fprop.get((site.key, wanted.node)) if gemm.codes and wanted is not None else None
        if made is None or not made.cast.quant.masked:
            return product
        # The product of a and b is [outer, in-features]; so is what the mask was made from where it contracts columns.
        left = _Source.of(Operand.of(gemm_operands(node)[0]).node).base
        transposed = decision.is_b(left) == (made.contraction == 1)
        return insert_call(self.graph, node, torch.ops.lowprec.apply_mask.default, (product, made.parts[-1], transposed))

    def _quantized(self, source: _Source, cast: Cast, anchor: Node, site: str) -> _Made:
        """The parts of a tensor under `cast`, made before `anchor` unless they exist."""
        key = (source.base, cast, source.spins)
        if key not in self.casts:
            args = (source.base, str(cast), *self._random(cast, source.spins))
            self.casts[key] = self._call(torch.ops.lowprec.quantize.default, args, cast, source.base, anchor, site)
        return self.casts[key]

    def _requantized(self, codes: _Made, source: _Source, cast: Cast, anchor: Node, site: str) -> _Made:
        """The same from codes."""
        key = (codes.parts[0], cast, source.spins)
        if key not in self.casts:
            value = source.base.meta["val"]
            cols = codes.cast.turned(value.shape)[-1]
            args = (codes.parts, str(codes.cast), str(cast), cols, value.dtype, *self._random(cast, source.spins))
            self.casts[key] = self._call(torch.ops.lowprec.requantize.default, args, cast, source.base, anchor, site)
        return self.casts[key]

    def _codes(self, source: _Source, decision: Decision) -> _Made | None:
        """What fprop made of a tensor; None, with a note, where its columns are not known as a number."""
        assert decision.site is not None
        made = self.fprop.get((decision.site.key, source.base))
        if made is not None and not isinstance(source.base.meta["val"].shape[-1], int):
            self.plan.notes.append(
                f"{decision.key} {decision.role}: quantised from the tensor and not from fprop's codes, "
                "whose number of columns varies"
            )
            return None
        return made

    def _random(self, cast: Cast, spins: tuple[int, int]) -> tuple[Any, ...]:
        return (draw_seed(self.graph, self.plan), len(self.casts), list(spins)) if cast.random else ()

    def _call(self, target: Any, args: tuple[Any, ...], cast: Cast, base: Node, anchor: Node, site: str) -> _Made:
        call = insert_call(self.graph, anchor, target, args)
        call.meta["lowprec"] = {"site": site, "cast": str(cast), "base": base.name}
        parts = []
        for index, name in enumerate(cast.quant.parts):
            part = insert_call(self.graph, anchor, operator.getitem, (call, index))
            part.meta["lowprec"] = {**call.meta["lowprec"], "part": name}
            parts.append(part)
        return _Made(parts, cast)

    def _size(self, node: Node, left: DotOperand, right: DotOperand) -> list[Any] | None:
        """(M, N) where an outer axis is packed in pairs, so that its length cannot be read off the codes."""
        loose = (left.cast is not None and left.cast.quant.packed and left.transposed) or (
            right.cast is not None and right.cast.quant.packed and not right.transposed
        )
        if not loose:
            return None
        operands = gemm_operands(node)
        return [self._length(operands[0], -2, node), self._length(operands[1], -1, node)]

    def _length(self, operand: Node, dim: int, anchor: Node) -> Any:
        size = operand.meta["val"].shape[dim]
        if isinstance(size, int):
            return size
        rank = len(operand.meta["val"].shape)
        return insert_call(self.graph, anchor, torch.ops.aten.sym_size.int, (operand, rank + dim))
