"""Rotations as algebra: put in where the recipe asks for them, then moved and merged where that is cheaper.

    k    y = mm(x, wT)       ->   y = mm(H(x), H(w)T)                   the two cancel in the product
    m    dx = mm(dy, w)      ->   dx = H^-1(mm(H(dy), w))               dy turned along its rows
    n    dx = mm(dy, w)      ->   dx = H^-1(mm(dy, H(w)))               w turned along its columns

A rotated tensor is made once, whoever reads it (`_Inserter`). What undoes a rotation is linear, so it moves through sums,
views, transposes and scaling of the other axis: `_cut` finds the cheapest place for every one of them at once.
The quantize pass then lets each rotation of an operand ride inside its quantisation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from lpcompile.joint import Operand, Site, gemm_bias, gemm_operands, insert_call
from lpcompile.passes.place import place
from lpcompile.pipeline import Decision, Plan, RotationCount, draw_seed
from lpcompile.recipe import Role, Rotation, Signs

assert __name__ == "lpcompile.passes.rotate", "import it as lpcompile.passes, not as passes"

aten = torch.ops.aten


def rotate(graph: Graph, plan: Plan) -> None:
    """Inserts the rotations of every converted GEMM and simplifies them; `plan.rotations` counts what is left."""
    by_node = plan.converted()
    inserter = _Inserter(graph, plan)
    for node in list(graph.nodes):
        if node in by_node:
            inserter.insert(node, by_node[node])
    if not inserter.asked:
        return
    moved = place(graph, plan.target)
    left = [n for n in graph.nodes if n.target is torch.ops.lowprec.hadamard.default]
    riding = sum(n.args[3] is None for n in left)
    plan.rotations = RotationCount(inserter.asked, riding, len(left) - riding, tuple(moved))
    graph.eliminate_dead_code()


@dataclass
class _Turn:
    """One rotation of one operand: along which storage axis, which signs, and the axis of the product to undo it on."""

    axis: int
    rotation: Rotation
    spin: int
    undone: int | None = None


@dataclass
class _Inserter:
    """Holds what was made so far, so that a second reader finds it."""

    graph: Graph
    plan: Plan
    asked: int = 0
    made: dict[tuple[Any, ...], Node] = field(default_factory=dict)
    spins: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def insert(self, node: Node, decision: Decision) -> None:
        """Replaces a GEMM by its rotated form."""
        operands = [Operand.of(value) for value in gemm_operands(node)]
        turns = [self._turns(operand, position, decision) for position, operand in enumerate(operands)]
        if not any(turns):
            return
        self.asked += sum(len(t) + sum(turn.undone is not None for turn in t) for t in turns)
        assert decision.site is not None
        sides = [self._operand(o, t, node, decision.site) for o, t in zip(operands, turns, strict=True)]
        undo = [turn for t in turns for turn in t if turn.undone is not None]
        bias = gemm_bias(node)
        plain = aten.bmm.default if len(node.meta["val"].shape) == 3 else aten.mm.default
        if bias is None or undo:
            product = insert_call(self.graph, node, plain, (sides[0], sides[1]))
        else:
            product = insert_call(self.graph, node, node.target, (bias, sides[0], sides[1]))
        decision.site.nodes[decision.role or Role.FPROP] = product
        result = product
        for turn in undo:
            assert turn.undone is not None
            size = self._size(node, operands[turn.undone], turn.undone)
            result = self._hadamard(result, _Turn(turn.undone, turn.rotation, turn.spin), size, node)
        if bias is not None and undo:
            result = insert_call(self.graph, node, aten.add.Tensor, (result, bias))
        node.replace_all_uses_with(result)
        self.plan.replaced(node, result)
        self.graph.erase_node(node)

    def _turns(self, operand: Operand, position: int, decision: Decision) -> list[_Turn]:
        """The rotations of one operand. Its contraction is the left one's last and the right one's first axis."""
        gemm, site = decision.gemm, decision.site
        assert gemm is not None and site is not None
        contraction = (1 - position) ^ int(operand.transposed)
        is_b = decision.is_b(operand.node)
        turns = []
        if gemm.k is not None:
            shared = {Role.FPROP: site.x, Role.DGRAD: site.w, Role.WGRAD: site.x}[decision.role or Role.FPROP].node
            turns.append(self._turn(gemm.k, contraction, operand, (decision.role, shared)))
        outer = gemm.n if is_b else gemm.m
        key: tuple[Any, ...] = ("outer", decision.role, operand.node)
        if is_b and gemm.codes and (fprop := self.plan.decision(site, Role.FPROP)) is not None:
            # The codes are in the rotation that fprop gave them: the same tensor, the same signs.
            assert fprop.gemm is not None
            outer, key = fprop.gemm.k, (Role.FPROP, site.x.node)
        if outer is not None:
            turns.append(self._turn(outer, 1 - contraction, operand, key, undone=position))
        return turns

    def _turn(self, rotation: Rotation, axis: int, operand: Operand, key: tuple[Any, ...], undone: int | None = None) -> _Turn:
        resolved = rotation.resolved(operand.node.meta["val"].shape[-2 + axis])
        drawn = resolved.signs is Signs.DRAWN
        return _Turn(axis, resolved, self.spins.setdefault(key, len(self.spins)) if drawn else 0, undone)

    def _operand(self, operand: Operand, turns: list[_Turn], node: Node, site: Site) -> Node:
        # What wgrad needs of the input is made in the forward pass, so that its codes are saved and not the tensor.
        anchor = site.nodes[Role.FPROP] if operand.node is site.x.node else node
        turned = operand.node
        for turn in sorted(turns, key=lambda t: -t.axis):
            turned = self._hadamard(turned, turn, None, anchor)
        if operand.transposed:
            rank = len(turned.meta["val"].shape)
            turned = insert_call(self.graph, node, aten.permute.default, (turned, [*range(rank - 2), rank - 1, rank - 2]))
        return turned

    def _hadamard(self, source: Node, turn: _Turn, size: Any, anchor: Node) -> Node:
        key = (source, turn.axis, turn.rotation, turn.spin, size)
        if key not in self.made:
            args: tuple[Any, ...] = (source, turn.axis, str(turn.rotation), size)
            if turn.rotation.signs is Signs.DRAWN:
                args = (*args, draw_seed(self.graph, self.plan), turn.spin)
            self.made[key] = insert_call(self.graph, anchor, torch.ops.lowprec.hadamard.default, args)
        return self.made[key]

    def _size(self, node: Node, operand: Operand, position: int) -> Any:
        """The length of the product's axis before padding."""
        size = node.meta["val"].shape[-2 + position]
        if isinstance(size, int):
            return size
        value = gemm_operands(node)[position]
        return insert_call(self.graph, node, aten.sym_size.int, (value, len(value.meta["val"].shape) - 2 + position))
