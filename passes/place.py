"""Where each rotation stands: the cheapest of all places that compute the same, by a minimum cut.

A rotation H along one axis of a tensor commutes with sums, views, transposes and scaling of the other axes. So each value
between two rotations may be held plain or turned, and a rotation is paid where a plain and a turned value meet:

    dx = H^-1(p1) + H^-1(p2) + H^-1(p3)      ->   dx = H^-1(p1 + p2 + p3)          one rotation in place of three
    dy = H(H^-1(p))                          ->   dy = p                           neighbours that cancel

For every kind of rotation (axis, size, signs) the values form a network: products that come turned are its source, values that
must be plain its sink, and an edge is worth the time that a rotation there takes on the target, by the cost model. A rotation
in front of a quantisation rides inside it and costs what it multiplies, no launch and no trip of the tensor through memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch.fx import Graph, Node

from lpcompile.joint import insert_call, size_hint
from lpcompile.kernel_cost import rotation_time
from lpcompile.recipe import Rotation
from lpcompile.target import Target

assert __name__ == "lpcompile.passes.place", "import it as lpcompile.passes, not as passes"

aten = torch.ops.aten
hadamard = torch.ops.lowprec.hadamard.default

_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_SAME = (aten.alias.default, aten.neg.default, aten.clone.default, torch.ops.prims.convert_element_type.default)
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_SCALES = (aten.mul.Tensor, aten.div.Tensor)
_SWAPS = (aten.permute.default, aten.transpose.int, aten.t.default)


@dataclass(frozen=True)
class _Kind:
    """Rotations that may meet: the op's arguments but for the axis, which a transpose exchanges."""

    rotation: str
    rest: tuple[object, ...] = ()

    @staticmethod
    def of(node: Node) -> _Kind | None:
        """The kind of a hadamard node; None where it pads or crops, so that it can only stay where it is."""
        source, axis, rotation, _, *rest = node.args
        assert isinstance(source, Node) and isinstance(axis, int)
        before, after = source.meta["val"].shape, node.meta["val"].shape
        if len(after) != 2 or (before[axis] is not after[axis] and not _equal(before[axis], after[axis])):
            return None
        return _Kind(str(rotation), tuple(rest))


def _equal(a: object, b: object) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a == b


def place(graph: Graph, target: Target) -> list[str]:
    """Moves and merges the graph's hadamard nodes where that is cheaper; a line for each change, with its reason."""
    found: dict[_Kind, set[bool]] = {}
    for node in graph.nodes:
        if node.target is hadamard and (kind := _Kind.of(node)) is not None:
            found.setdefault(kind, set()).add(_last(node))
    lines = []
    for kind, axes in found.items():
        # Together, for those that meet through a transpose; then each axis, where one tensor is turned along both.
        for each in [axes, {True}, {False}] if len(axes) == 2 else [axes]:
            lines += _Network(graph, kind, target, frozenset(each)).solve()
    return lines


def _last(node: Node) -> bool:
    """True where a hadamard node turns the last axis, False for all others taken as one."""
    return bool(node.args[1] == 1)


@dataclass(frozen=True)
class _Value:
    """A tensor with the axis in question (`last`, or all before the last): views and transposes carry it along."""

    node: Node
    last: bool


@dataclass
class _Network:
    """One kind of rotation on one graph. `turned`: products whose value is turned; `riders`: forward hadamard nodes; `axis`: of
    each value whether its last axis is the one in question."""

    graph: Graph
    kind: _Kind
    target: Target
    axes: frozenset[bool]
    turned: dict[Node, Node] = field(default_factory=dict)
    riders: list[Node] = field(default_factory=list)
    free: dict[Node, bool] = field(default_factory=dict)
    axis: dict[Node, bool] = field(default_factory=dict)
    made: dict[tuple[Node, bool], Node] = field(default_factory=dict)
    own: set[Node] = field(default_factory=set)

    def solve(self) -> list[str]:
        """Cuts, rewrites and says what became of which rotations."""
        for node in self.graph.nodes:
            if self._mine(node):
                if node.args[3] is None:
                    self.riders.append(node)
                else:
                    self.turned[node] = node.args[0]
        if not self._grow() or (not self.free and not any(rider.args[0] in self.turned for rider in self.riders)):
            return []
        # Backwards, so that of equal cuts that next to the products is taken: there a rotation back may ride on a product.
        cost, (_, side) = nx.minimum_cut(self._network().reverse(), "plain", "turned")
        plain = self._cost_as_it_is()
        if cost > plain - 1e-6:  # not for what only rounding tells apart
            return []
        before = len(self.turned) + len(self.riders)
        after = self._rewrite({node for node in self.free if ("value", node) in side})
        axis = "rows and columns" if len(self.axes) == 2 else "columns" if True in self.axes else "rows"
        why = f"{plain:.1f} -> {cost:.1f} us predicted on {self.target.name}"
        return [f"{self.kind.rotation} along {axis}: {before} -> {after} rotations, {why}"]

    def _mine(self, node: Node) -> bool:
        return node.target is hadamard and _last(node) in self.axes and _Kind.of(node) == self.kind

    # ---- the network -----------------------------------------------------------------------------------------------

    def _grow(self) -> bool:
        """Finds the values that may be held turned: what commuting ops make of turned ones, and what they were made from.

        False where one tensor would have to be turned along two axes (a sum of x and its transpose): all stays then.
        """
        work = [_Value(node, _last(node)) for node in self.turned]
        work += [_Value(r.args[0], _last(r)) for r in self.riders if isinstance(r.args[0], Node)]
        while work:
            value = work.pop()
            if value.node in self.axis:
                if self.axis[value.node] != value.last:
                    return False
                continue
            self.axis[value.node] = value.last
            if value.node not in self.turned and self._inputs(value.node, value.last) is not None:
                self.free[value.node] = value.last
                work += self._inputs(value.node, value.last) or []
            elif value.node not in self.turned:
                continue
            users = [user for user in value.node.users if not self._mine(user)]
            work += [_Value(user, last) for user in users if (last := _axis_after(user, value)) is not None]
        return True

    def _inputs(self, node: Node, last: bool) -> list[_Value] | None:
        """The inputs that must be turned for `node`, a commuting op, to come out turned along `last`; None if it is none."""
        found = [] if self._mine(node) else list(_turned_inputs(node, last))
        return found or None

    def _consumers(self, node: Node) -> Iterator[Node]:
        """Free values and riders that read `node`, a plain value, a free one or a hadamard that undoes."""
        for user in node.users:
            if user in self.riders or (
                user in self.free and node in {v.node for v in self._inputs(user, self.free[user]) or ()}
            ):
                yield user

    def _network(self) -> nx.DiGraph:
        """Capacities in microseconds; the source side holds what is turned."""
        net = nx.DiGraph()
        net.add_node("turned")
        net.add_node("plain")
        for rider in self.riders:
            net.add_edge("turned", ("value", rider))
        for node in [*self.turned, *self.free]:
            start = "turned" if node in self.turned else ("value", node)
            consumers = list(self._consumers(node))
            # Turned back once, for whoever needs it plain.
            net.add_edge(start, ("undone", node), capacity=self._time(node))
            for consumer in consumers:
                net.add_edge(("undone", node), ("value", consumer))
            if len(consumers) < len(node.users):
                net.add_edge(("undone", node), "plain")
        for source in {v.node for n in self.free for v in self._inputs(n, self.free[n]) or ()} | {
            r.args[0] for r in self.riders if isinstance(r.args[0], Node)
        }:
            if source in self.turned:
                continue
            end = ("value", source) if source in self.free else "plain"
            # Turned once, for whoever needs it turned; inside the quantisation if that is all.
            net.add_edge(("redone", source), end, capacity=self._time(source))
            for consumer in self._consumers(source):
                if consumer in self.riders:
                    net.add_edge(("value", consumer), end, capacity=self._time(consumer, rides=True))
                else:
                    net.add_edge(("value", consumer), ("redone", source))
        return net

    def _cost_as_it_is(self) -> float:
        return sum(map(self._time, self.turned)) + sum(self._time(rider, rides=True) for rider in self.riders)

    def _time(self, node: Node, rides: bool = False) -> float:
        """Microseconds of turning a tensor, along the axis that its value in the network has."""
        last = _last(node) if rides else self.axis[node]
        return _time(self.kind.rotation, node.meta["val"], last, rides, self.target)

    # ---- the rewrite -----------------------------------------------------------------------------------------------

    def _rewrite(self, held: set[Node]) -> int:
        """Holds the values of `held` turned. Returns how many rotations of this kind are left."""
        positions = {node: index for index, node in enumerate(self.graph.nodes)}
        # Who needs a held value plain: not those who come to read it in place of a rotation that cancels.
        plain = {node: [u for u in node.users if u not in self.free and u not in self.riders] for node in held}
        for node in sorted((*self.free, *self.riders), key=positions.__getitem__):
            turned = node in held or node in self.riders
            last = self.free[node] if node in self.free else _last(node)
            inputs = self._inputs(node, last) if node in self.free else [_Value(node.args[0], last)]  # type: ignore[arg-type]
            for value in inputs or ():
                is_turned = value.node in held or value.node in self.turned
                raw = self.turned.get(value.node, value.node)
                if node in self.riders:
                    if is_turned:
                        node.replace_all_uses_with(raw)
                elif turned and is_turned:
                    node.replace_input_with(value.node, raw)
                elif turned:
                    node.replace_input_with(value.node, self._turn(raw, value.last, node, back=False))
                elif value.node in held:
                    node.replace_input_with(value.node, self._turn(raw, value.last, node, back=True))
        for node, users in plain.items():
            for user in users:
                user.replace_input_with(node, self._turn(node, self.free[node], user, back=True))
        self.graph.eliminate_dead_code()
        return sum(map(self._mine, self.graph.nodes))

    def _turn(self, source: Node, last: bool, anchor: Node, back: bool) -> Node:
        """`source` turned, or turned back, made before its first reader; of more than two axes by way of a matrix."""
        if (source, back) in self.made:
            return self.made[source, back]
        readers = ({*source.users} - self.own - {n for n in source.users if n.target is hadamard}) | {anchor}
        first = next(n for n in self.graph.nodes if n in readers)
        shape = list(source.meta["val"].shape)
        result = source
        if len(shape) != 2:
            result = self._call(first, aten.reshape.default, result, [math.prod(shape[:-1]), shape[-1]])
        axis = 1 if last else 0
        size = result.meta["val"].shape[axis] if back else None
        result = self._call(first, hadamard, result, axis, self.kind.rotation, size, *self.kind.rest)
        if len(shape) != 2:
            result = self._call(first, aten.reshape.default, result, shape)
        self.made[source, back] = result
        return result

    def _call(self, anchor: Node, target: object, *args: object) -> Node:
        node = insert_call(self.graph, anchor, target, args)
        self.own.add(node)
        return node


def _time(rotation: str, value: torch.Tensor, last: bool, rides: bool, target: Target) -> float:
    cols = size_hint(value.shape[-1])
    rows = size_hint(value.numel()) // max(cols, 1)
    return float(rotation_time(_parsed(rotation), rows, cols, int(last), value.element_size(), target, rides))


_parsed = functools.cache(Rotation.parse)


def _turned_inputs(node: Node, last: bool) -> Iterator[_Value]:
    """Inputs of a commuting op whose result is turned along `last`; nothing where the op does not commute."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or any(not isinstance(s, int) for s in value.shape):
        return
    tensors = node.all_input_nodes
    shape = list(value.shape)
    if node.target in (*_RESHAPES, *_SAME) and len(tensors) == 1:
        before = list(tensors[0].meta["val"].shape)
        if before and len(shape) > 1 and len(before) > 1 and before[-1] == shape[-1]:
            yield _Value(tensors[0], last)
    elif node.target in _SWAPS and len(shape) == 2:
        if node.target is not aten.permute.default or node.args[1] == [1, 0]:
            yield _Value(tensors[0], not last)
    elif node.target in _SUMS:
        if len(tensors) == 2 and all(list(t.meta["val"].shape) == shape for t in tensors):
            yield from (_Value(t, last) for t in tensors)
    elif node.target in _SCALES:
        scaled, by = node.args[0], node.args[1]
        if (
            isinstance(scaled, Node)
            and list(scaled.meta["val"].shape) == shape
            and scaled is not by
            and _constant(by, last, shape)
        ):
            yield _Value(scaled, last)
    elif node.target is hadamard and _last(node) != last and isinstance(node.args[0], Node):
        yield _Value(node.args[0], last)  # rotations of rows and of columns commute


def _constant(factor: object, last: bool, shape: list[int]) -> bool:
    """True where a factor is the same all along the turned axis."""
    if not isinstance(factor, Node):
        return isinstance(factor, (int, float))
    sizes = list(factor.meta["val"].shape)
    sizes = [1] * (len(shape) - len(sizes)) + sizes
    return sizes[-1] == 1 if last else all(size == 1 for size in sizes[:-1])


def _axis_after(user: Node, value: _Value) -> bool | None:
    """Along which axis `user` comes out turned if `value` is; None where it does not commute."""
    for last in (True, False):
        if any(v == value for v in _turned_inputs(user, last)):
            return last
    return None
