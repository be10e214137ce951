"""What computes a tensor only for it to be quantised is done while it is quantised.

    y = mul(w, bf16(mul(f32(x), rstd)));  cast(y)   ->   cast x0:bf16 x1:bf16[c] x2:f32[r] = mul(x1, bf16(mul(x0, x2)))
    h = mul(silu(g), u);  cast(h)                   ->   cast x0:bf16 x1:bf16 = mul(bf16(silu..), x1)

A pointwise node is taken in where nobody else reads it, or where what it is computed from is no more to read than itself: a
cast then computes it again in place of reading it. Reductions, matrix products and whatever else are inputs. Nothing is taken
in where that has wider tensors written than the quantised one: a gradient in FP32 that is rounded here stays with what computes
it. Each node keeps the rounding of its own dtype, so that the meaning is that of the graph run op by op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from lpcompile.expr import Call as Apply
from lpcompile.expr import Expr, Load, Number, call
from lpcompile.joint import insert_call, is_backward
from lpcompile.kernel import CastKernel, Input
from lpcompile.passes.forms import FUSED, Call, getitem, kernel_of, parts_of
from lpcompile.pipeline import Plan

assert __name__ == "lpcompile.passes.prologue", "import it as lpcompile.passes, not as passes"

aten = torch.ops.aten
_MATRICES = 4  # that one cast reads at most

_UNARY: dict[Any, str] = {
    aten.neg.default: "neg",
    aten.abs.default: "abs",
    aten.exp.default: "exp",
    aten.erf.default: "erf",
    aten.tanh.default: "tanh",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.reciprocal.default: "reciprocal",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.silu.default: "silu",
}
_BINARY: dict[Any, str] = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
}
_SCALAR: dict[Any, str] = {aten.add.Scalar: "add", aten.sub.Scalar: "sub", aten.mul.Scalar: "mul", aten.div.Scalar: "div"}
_CONVERT = torch.ops.prims.convert_element_type.default
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_KEPT_ORDER = (
    *RESHAPES,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.alias.default,
    aten.clone.default,
)
# Computed by Inductor where it is read, like whatever is pointwise, unless the reader is a kernel of ours.
_IN_PASSING = (aten.scatter.value, aten.scatter.src, aten.full.default, aten.constant_pad_nd.default)
_ROUNDED = {torch.bfloat16: "bf16", torch.float16: "f16"}


def shape_kind(node: Node, rows: Any, cols: Any) -> str | None:
    """How a tensor broadcasts to [rows, cols] in row-major order: "" a matrix, "r" one number a row, "c" one a column."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    shape = list(value.shape)
    if not shape:
        return None
    lead = math.prod(shape[:-1])
    if _same(shape[-1], cols) and _same(lead, rows):
        return ""
    if _same(shape[-1], 1) and _same(lead, rows):
        return "r"
    if _same(shape[-1], cols) and _same(lead, 1):
        return "c"
    return None


def _same(a: Any, b: Any) -> bool:
    """Equal for certain: sizes that are symbols are compared as expressions, without a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(getattr(getattr(a, "node", None), "expr", a) == getattr(getattr(b, "node", None), "expr", b))


def meaning(node: Node) -> tuple[tuple[Any, ...], Callable[..., Expr]] | None:
    """(operands, what they become) of a pointwise node, rounded as its dtype is; None for any other node."""
    args, kwargs = node.args, dict(node.kwargs)
    if node.target in (_CONVERT, *_KEPT_ORDER):
        value = (args[0],)

        def same(x: Expr) -> Expr:
            return x

        found: tuple[tuple[Any, ...], Callable[..., Expr]] = (value, same)
    elif node.target in _UNARY and not kwargs:
        found = ((args[0],), lambda x: call(_UNARY[node.target], x))
    elif (node.target in _BINARY or node.target in _SCALAR) and kwargs.get("alpha", 1) == 1 and set(kwargs) <= {"alpha"}:
        op = _BINARY.get(node.target) or _SCALAR[node.target]
        found = ((args[0], args[1]), lambda x, y: call(op, x, y))
    elif node.target is aten.pow.Tensor_Scalar and args[1] == 2:
        found = ((args[0],), lambda x: call("mul", x, x))
    else:
        return None
    operands, apply = found
    if any(not isinstance(o, Node | int | float) or isinstance(o, bool) for o in operands):
        return None
    rounding = _ROUNDED.get(node.meta["val"].dtype)
    before = operands[0].meta["val"].dtype if isinstance(operands[0], Node) and "val" in operands[0].meta else None
    moved = node.target in _KEPT_ORDER or (node.target is _CONVERT and before == node.meta["val"].dtype)
    if rounding is None or moved:
        return operands, apply
    return operands, lambda *values: call(rounding, apply(*values))


@dataclass
class Region:
    """A pointwise region that ends in `root`, over [rows, cols]: which nodes are taken in, and which are read."""

    root: Node
    rows: Any
    cols: Any
    position: dict[Node, int]
    allowed: Callable[[Node], bool]
    taken: set[Node] = field(default_factory=set)
    inputs: dict[Node, str] = field(default_factory=dict)  # how each broadcasts

    def grow(self) -> None:
        """Takes nodes in from the root upwards, the latest first, so that all readers of a node are decided before it."""
        self.inputs = {self.root: ""}
        refused: set[Node] = set()
        while open_ := [node for node in self.inputs if node not in refused and self.inputs[node] == ""]:
            node = max(open_, key=self.position.__getitem__)
            operands = self._operands(node)
            if operands is None or not self.allowed(node) or not self._worth(node, operands):
                refused.add(node)
                continue
            del self.inputs[node]
            self.taken.add(node)
            self.inputs.update(operands)

    def _operands(self, node: Node) -> dict[Node, str] | None:
        """The tensors that a node is computed from and how they broadcast; None where it cannot be taken in."""
        found = meaning(node)
        if found is None:
            return None
        kinds: dict[Node, str] = {}
        for operand in found[0]:
            if isinstance(operand, Node):
                kind = shape_kind(operand, self.rows, self.cols)
                if kind is None:
                    return None
                kinds[operand] = kind
        return kinds

    def _worth(self, node: Node, operands: dict[Node, str]) -> bool:
        """Nobody else reads the node, or its operands are no more to read than itself."""
        after = {each for each, kind in {**self.inputs, **operands}.items() if kind == "" and each is not node}
        if len(after) > _MATRICES:
            return False
        if node is self.root or all(user in self.taken for user in node.users):
            return True
        new = frozenset[Node]().union(*(self.leaves(each) for each, kind in operands.items() if kind == ""))
        return _bytes(new - self.inputs.keys()) <= _itemsize(node)

    def leaves(self, node: Node, depth: int = 8) -> frozenset[Node]:
        """The matrices to read to have one: itself, or what it is computed from, whichever is less."""
        operands = self._operands(node) if depth and self.allowed(node) else None
        if operands is None:
            return frozenset((node,))
        found = frozenset[Node]().union(*(self.leaves(each, depth - 1) for each, kind in operands.items() if kind == ""))
        return found if _bytes(found) <= _itemsize(node) else frozenset((node,))

    def pays(self) -> bool:
        """What would be written only to be read here is no more than the root itself."""
        matrices = (node for node, kind in self.inputs.items() if kind == "" and node is not self.root)
        alone = [node for node in matrices if _in_passing(node) and self.taken.issuperset(node.users)]
        return _bytes(alone) <= _itemsize(self.root)

    def expression(self) -> tuple[Expr, list[Node]]:
        """The root over its inputs, matrices first."""
        order = sorted(self.inputs, key=lambda node: (self.inputs[node] != "", self.position[node]))
        values: dict[Node, Expr] = {node: Load(index) for index, node in enumerate(order)}
        for node in sorted(self.taken, key=self.position.__getitem__):
            found = meaning(node)
            assert found is not None
            operands, apply = found
            values[node] = apply(*(values[o] if isinstance(o, Node) else Number(float(o)) for o in operands))
        return values[self.root], order


def _in_passing(node: Node) -> bool:
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return pointwise or node.target in _IN_PASSING


def _itemsize(node: Node) -> int:
    return int(node.meta["val"].element_size())


def _bytes(nodes: Iterable[Node]) -> int:
    return sum(_itemsize(each) for each in nodes)


def positions(graph: Graph) -> dict[Node, int]:
    """Each node's place in the graph."""
    return {node: index for index, node in enumerate(graph.nodes)}


def flat(graph: Graph, anchor: Node, node: Node, kind: str, rows: Any, cols: Any) -> Node:
    """An input as the kernel reads it: a matrix [rows, cols] or a vector."""
    shape = {"": [rows, cols], "r": [rows], "c": [cols]}[kind]
    value = node.meta["val"]
    if len(value.shape) == len(shape):
        return node
    if not all(isinstance(size, int) for size in shape):
        shape = [size if isinstance(size, int) else -1 for size in shape]
    return insert_call(graph, anchor, aten.reshape.default, (node, shape))


def absorb(graph: Graph, plan: Plan, node: Node) -> Node | None:
    """Grows a cast's prologue."""
    kernel = kernel_of(node, CastKernel)
    if kernel is None or not kernel.plain:
        return None
    given = Call.of(node)
    x = given.inputs[0]
    rows, cols = x.meta["val"].shape
    late = is_backward(node)
    region = Region(x, rows, cols, positions(graph), lambda each: late or not is_backward(each))
    region.grow()
    if not region.pays():
        return None
    seeds = [user for user in x.users if user.target is torch.ops.lowprec.draw_seed.default]
    others = [user for user in x.users if user is not node and user not in seeds and user.target is not aten.sym_size.int]
    keep = bool(others)
    anchor = _kept_at(region, node, others, given.seed) if keep else node
    if anchor is None:
        return None
    expr, order = region.expression()
    if isinstance(expr, Load) or not order or region.inputs[order[0]] != "" or _trivial(expr, order, x):
        return None
    inputs = tuple(Input(each.meta["val"].dtype, region.inputs[each]) for each in order)
    made_kernel = CastKernel(kernel.outputs, kernel.dtype, inputs, (expr,), keep)
    reads = [flat(graph, anchor, each, region.inputs[each], rows, cols) for each in order]
    made_call = Call(reads, str(made_kernel), given.sizes, given.seed, given.uses, given.spins)
    made = insert_call(graph, anchor, FUSED, made_call.args())
    made.meta.update({key: node.meta[key] for key in ("lowprec", "partitioner_tag", "recompute", "rules") if key in node.meta})
    for index, parts in parts_of(node).items():
        for part in parts:
            part.replace_all_uses_with(getitem(graph, node, made, index + keep, part))
            graph.erase_node(part)
    graph.erase_node(node)
    for seed in seeds:
        # It looks at a tensor only for its device, and is drawn before the cast that may need it.
        seed.replace_input_with(x, order[0])
    if keep:
        kept = getitem(graph, made.next, made, 0)
        x.replace_all_uses_with(kept, lambda user: user is not made)
    return made


def _trivial(expr: Expr, order: list[Node], x: Node) -> bool:
    """True where nothing is computed: the tensor itself in another shape, or rounded to what it is."""
    return isinstance(expr, Apply) and expr.args == (Load(0),) and expr.op == _ROUNDED.get(order[0].meta["val"].dtype)


def _kept_at(region: Region, cast: Node, others: list[Node], seed: Node | None) -> Node | None:
    """Where others read the tensor too, the cast writes it for them, and stands before the first of them.

    None where it should not, because one of them would have the tensor computed in passing, or cannot: a cast of backward
    writes nothing for forward, and none stands before its own seed.
    """
    if any(meaning(user) is not None and user.target not in _KEPT_ORDER for user in others):
        return None
    if is_backward(cast) and not all(is_backward(user) for user in others):
        return None
    anchor = min((cast, *others), key=region.position.__getitem__)
    if seed is not None and region.position[seed] > region.position[anchor]:
        return None
    return anchor
