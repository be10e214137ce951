"""The rewrite: each converted GEMM becomes a scaled product of two quantised operands.

    y = mm(x, wT)        ->   xq = quantize(x, ..);  wq = quantize(w, ..);  y = scaled_mm(xq, wq)
    y = addmm(b, x, wT)  ->   the same with the bias added in FP32 before the one rounding of the output

An operand is quantised once per distinct Cast, whoever reads it: q, k and v share one, and so do forward and backward
where the Cast is the same. What wgrad needs of the input is quantised in the forward pass, so that codes are saved.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from lpcompile.joint import Operand, gemm_bias, gemm_operands, insert_call
from lpcompile.pipeline import Decision, Plan
from lpcompile.recipe import Cast, Dot, DotOperand, Role

assert __name__ == "lpcompile.passes.quantize", "import it as lpcompile.passes, not as passes"


def quantize(graph: Graph, plan: Plan) -> None:
    """Rewrites every converted GEMM, in graph order, so that a shared cast stands before its first reader."""
    order = list(graph.nodes)
    by_node = {d.node: d for d in plan.decisions if d.converted}
    converted = [node for node in order if node.name in by_node]
    rewriter = _Rewriter(graph, converted)
    for node in converted:
        rewriter.rewrite(node, by_node[node.name])
    graph.eliminate_dead_code()


class _Rewriter:
    """Holds the casts made so far, by (base, Cast)."""

    def __init__(self, graph: Graph, converted: list[Node]) -> None:
        self.graph, self.converted = graph, converted
        self.casts: dict[tuple[Node, Cast], list[Node]] = {}
        self.spins: dict[tuple[Role | None, Node], int] = {}
        self.seed: Node | None = None

    def rewrite(self, node: Node, decision: Decision) -> None:
        assert decision.gemm is not None and decision.site is not None
        site = decision.site
        sides: list[tuple[list[Node], DotOperand]] = []
        for position, value in enumerate(gemm_operands(node)):
            operand = Operand.of(value)
            name = "b" if self._is_b(operand, decision) else "a"
            quant = decision.gemm.b if name == "b" else decision.gemm.a
            if quant is None:
                sides.append(([operand.node], DotOperand(None, operand.transposed)))
                continue
            # The contraction is the left operand's last axis and the right one's first, in storage order.
            cast = Cast(quant, (1 - position) ^ int(operand.transposed), decision.gemm.rotation)
            # The input's copy for wgrad belongs to the forward pass: its codes are saved, not the tensor.
            anchor = site.nodes[Role.FPROP] if operand.node is site.x.node else node
            decision.casts[name] = f"{operand.node.name}|{cast}"
            parts = self.cast(operand.node, cast, anchor, site.key, self._spin(decision))
            sides.append((parts, DotOperand(cast, operand.transposed)))
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
        node.replace_all_uses_with(product)

    @staticmethod
    def _is_b(operand: Operand, decision: Decision) -> bool:
        """True for the operand that the recipe calls b: the weight in fprop and dgrad, the input in wgrad."""
        assert decision.site is not None
        other = decision.site.x if decision.role is Role.WGRAD else decision.site.w
        return operand.node is other.node

    def _spin(self, decision: Decision) -> int:
        """The number of a GEMM's sign vector. GEMMs that contract with one tensor share it, so that its cast can be shared:
        the weight in fprop and dgrad, the input in wgrad."""
        assert decision.site is not None
        site = decision.site
        shared = {Role.FPROP: site.x, Role.DGRAD: site.w, Role.WGRAD: site.x}[decision.role or Role.FPROP].node
        return self.spins.setdefault((decision.role, shared), len(self.spins))

    def _seed(self) -> Node:
        """The step's one seed, drawn before the first GEMM. Saved, never recomputed: a second draw would differ."""
        if self.seed is None:
            anchor = self.converted[0]
            self.seed = insert_call(self.graph, anchor, torch.ops.lowprec.draw_seed.default, (gemm_operands(anchor)[0],))
            for key in ("recompute", "ac_graph_id"):
                self.seed.meta.pop(key, None)
        return self.seed

    def cast(self, base: Node, cast: Cast, anchor: Node, site: str, spin: int) -> list[Node]:
        """The parts of `base` under `cast`, made before `anchor` unless they exist."""
        found = self.casts.get((base, cast))
        if found is None:
            args: tuple[Any, ...] = (base, str(cast))
            if cast.random:
                args = (*args, self._seed(), len(self.casts), spin)
            call = insert_call(self.graph, anchor, torch.ops.lowprec.quantize.default, args)
            names = cast.quant.parts
            found = []
            for index, name in enumerate(names):
                part = insert_call(self.graph, anchor, operator.getitem, (call, index))
                part.meta["lowprec"] = {"site": site, "part": name, "cast": str(cast), "base": base.name}
                found.append(part)
            call.meta["lowprec"] = {"site": site, "cast": str(cast), "base": base.name}
            self.casts[base, cast] = found
        return found

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
