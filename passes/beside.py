"""Two casts that read the same tensors become one.

    cast x0 x1 = mul(x1, silu(x0)) -> a;  cast x0 x1 x2 = mul(mul(x2, x1), dsilu(x0)) -> b
        ->   cast x0 x1 x2 = mul(x1, silu(x0)); mul(mul(x2, x1), dsilu(x0)) -> a; b

So the gradients of a gated layer's two branches are computed together: what both need is read, and computed, once. Casts that
turn what they quantise have no registers left for a second tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Graph, Node

from lpcompile.expr import Call as Apply
from lpcompile.expr import Expr, Load
from lpcompile.joint import insert_call, is_backward
from lpcompile.kernel import CastKernel, Input
from lpcompile.passes.forms import FUSED, Call, getitem, kernel_of, parts_of, streams
from lpcompile.passes.prologue import RESHAPES, flat, positions, shape_kind
from lpcompile.pipeline import Plan

assert __name__ == "lpcompile.passes.beside", "import it as lpcompile.passes, not as passes"


_TAGS = ("partitioner_tag", "recompute")


@dataclass(frozen=True)
class _Cast:
    """A cast with one prologue, whose result nobody else reads. tensors: what it reads, behind views, in order."""

    node: Node
    kernel: CastKernel
    call: Call
    tensors: tuple[Node, ...]

    @staticmethod
    def of(node: Node) -> _Cast | None:
        kernel = kernel_of(node, CastKernel)
        if kernel is None or kernel.plain or kernel.keep or len(kernel.prologues) > 1 or any(c.turns for c in kernel.casts):
            return None
        call = Call.of(node)
        shape = call.inputs[0].meta["val"].shape
        each = zip(call.inputs, kernel.inputs, strict=True)
        return _Cast(node, kernel, call, tuple(_behind(tensor, kind.vector, *shape) for tensor, kind in each))

    @property
    def inputs(self) -> list[tuple[Node, Input]]:
        return list(zip(self.tensors, self.kernel.inputs, strict=True))

    @property
    def matrices(self) -> set[Node]:
        return {tensor for tensor, kind in self.inputs if not kind.vector}

    def fits(self, other: _Cast) -> bool:
        """True where one reads no matrix that the other does not."""
        within = self.matrices <= other.matrices or other.matrices <= self.matrices
        if not within or self.kernel.dtype != other.kernel.dtype or is_backward(self.node) != is_backward(other.node):
            return False
        seeds = {each.call.seed for each in (self, other)} - {None}
        tags = all(self.node.meta.get(key) == other.node.meta.get(key) for key in _TAGS)
        return tags and len(seeds) < 2 and shape_kind(other.call.inputs[0], *self.call.inputs[0].meta["val"].shape) == ""


def _behind(node: Node, vector: str, rows: Any, cols: Any) -> Node:
    """What an input is a view of, as far back as that broadcasts as the input does."""
    while node.target in RESHAPES and isinstance(before := node.args[0], Node) and shape_kind(before, rows, cols) == vector:
        node = before
    return node


def _renumbered(expr: Expr, places: Sequence[int]) -> Expr:
    if isinstance(expr, Load):
        return Load(places[expr.index])
    return Apply(expr.op, tuple(_renumbered(each, places) for each in expr.args)) if isinstance(expr, Apply) else expr


def beside(graph: Graph, plan: Plan, node: Node) -> Node | None:
    """A cast and the next one that reads what it reads."""
    first = _Cast.of(node)
    if first is None:
        return None
    users = {user for tensor in first.matrices for user in _users(tensor)} - {node}
    others = [other for other in map(_Cast.of, users) if other is not None and first.fits(other)]
    place = positions(graph) if others else {}
    for other in sorted(others, key=lambda each: place[each.node]):
        if place[other.node] > place[node] and (anchor := _anchor(first, other, place)) is not None:
            return _joined(graph, first, other, anchor)
    return None


def _users(tensor: Node) -> set[Node]:
    """Casts that read a tensor, perhaps behind views."""
    found = set[Node]()
    for user in tensor.users:
        found |= _users(user) if user.target in RESHAPES else {user} if user.target is FUSED else set()
    return found


def _anchor(first: _Cast, other: _Cast, place: Mapping[Node, int]) -> Node | None:
    """The first reader of either, if all that both read is there before it: then neither waits for the other's result. None in
    another phase, which would have to keep what they read in place of what they write."""
    readers = [reader for each in (first, other) for part in each.node.users for reader in part.users]
    if not readers:
        return None
    anchor = min(readers, key=place.__getitem__)
    needed = [*first.tensors, *other.tensors, *(each.call.seed for each in (first, other) if each.call.seed is not None)]
    ready = all(place[each] < place[anchor] for each in needed)
    return anchor if ready and is_backward(anchor) == is_backward(first.node) else None


def _joined(graph: Graph, first: _Cast, other: _Cast, anchor: Node) -> Node:
    inputs = list(dict.fromkeys([*first.inputs, *other.inputs]))
    prologues = [_renumbered(each.kernel.prologues[0], list(map(inputs.index, each.inputs))) for each in (first, other)]
    outputs = (*first.kernel.outputs, *(replace(output, of=1) for output in other.kernel.outputs))
    kernel = CastKernel(outputs, first.kernel.dtype, tuple(kind for _, kind in inputs), tuple(prologues))
    rows, cols = first.call.inputs[0].meta["val"].shape
    reads = [flat(graph, anchor, tensor, kind.vector, rows, cols) for tensor, kind in inputs]
    seed = first.call.seed or other.call.seed
    call = Call(reads, str(kernel), [], seed, *streams([first.call, other.call], seed))
    made = insert_call(graph, anchor, FUSED, call.args())
    made.meta.update({key: first.node.meta[key] for key in ("lowprec", "rules", *_TAGS) if key in first.node.meta})
    start = 0
    for each in (first, other):
        for index, parts in sorted(parts_of(each.node).items()):
            for part in parts:
                part.replace_all_uses_with(getitem(graph, anchor, made, start + index, part))
                graph.erase_node(part)
        start += sum(len(output.parts) for output in each.kernel.outputs)
        graph.erase_node(each.node)
    return made
