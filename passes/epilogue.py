"""What follows a product is done before its result is stored: a clip mask, a rotation back, pointwise work.

apply_mask(gemm(..), bits)         ->   gemm .. * mask
hadamard(gemm(..), axis, h32, n)   ->   gemm .. * axis:h32
add(x, view(gemm(..)))             ->   gemm .. then add(x0, x1)
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from lpcompile.errors import KernelError
from lpcompile.expr import Expr, Load, Number
from lpcompile.joint import insert_call, is_backward
from lpcompile.kernel import GemmKernel, Input, Then
from lpcompile.match import reaches
from lpcompile.ops import parse_rotation
from lpcompile.passes.forms import FUSED, Call, getitem, kernel_of
from lpcompile.passes.prologue import RESHAPES, flat, meaning, shape_kind
from lpcompile.pipeline import Plan

assert __name__ == "lpcompile.passes.epilogue", "import it as lpcompile.passes, not as passes"

_MATRICES = 1  # that a product reads besides its operands: more would take the registers of its sums


def _producer(value: Any) -> tuple[Node, GemmKernel] | None:
    """The gemm whose result a node is, perhaps seen in another shape in between, where nobody else reads it."""
    seen = value
    while isinstance(value, Node) and value.target in RESHAPES and len(value.users) == 1:
        value = value.args[0]
    if not isinstance(value, Node) or value.target is not operator.getitem or len(value.users) != 1:
        return None
    source = value.args[0]
    assert isinstance(source, Node)
    kernel = kernel_of(source, GemmKernel)
    if kernel is None or kernel.then is not None:
        return None
    same = len(seen.meta["val"].shape) == 2 and shape_kind(seen, *source.meta["val"][0].shape) == ""
    return (source, kernel) if same else None


def _replaced(graph: Graph, anchor: Node, old: Node, given: Call) -> Node:
    made = insert_call(graph, anchor, FUSED, given.args())
    made.meta.update({key: old.meta[key] for key in ("lowprec", "rules") if key in old.meta})
    return made


def masked(graph: Graph, plan: Plan, node: Node) -> Node | None:
    """A clip mask on a product."""
    found = _producer(node.args[0])
    if found is None or found[1].mask or found[1].undo != (None, None):
        return None
    source, kernel = found
    given = Call.of(source)
    wanted = replace(kernel, mask=True, mask_transposed=bool(node.args[2]))
    bits = node.args[1]
    assert isinstance(bits, Node)
    inputs = [*given.inputs, bits]
    made = _replaced(graph, node, source, replace(given, inputs=inputs, kernel=str(wanted)))
    node.replace_all_uses_with(getitem(graph, node, made, 0))
    graph.erase_node(node)
    return made


def undone(graph: Graph, plan: Plan, node: Node) -> Node | None:
    """A rotation back on a product. Rows come before columns: the order in which a kernel does it."""
    arguments: tuple[Any, ...] = node.args
    value, axis, text, size, *drawn = arguments
    found = _producer(value)
    if found is None or size is None or found[1].undo[axis] is not None or (axis == 0 and found[1].undo[1] is not None):
        return None
    source, kernel = found
    given = Call.of(source)
    undo = list(kernel.undo)
    undo[axis] = parse_rotation(str(text))
    sizes = given.sizes or list(source.meta["val"][0].shape)
    sizes[axis] = size
    if any(not isinstance(each, Node | int) for each in sizes):
        return None
    spins = given.spins or [0, 0]
    if drawn:
        spins[axis] = drawn[1]
    seed = drawn[0] if drawn else given.seed
    wanted = replace(kernel, undo=(undo[0], undo[1]))
    call = Call(given.inputs, str(wanted), sizes, seed, [0] if seed is not None else [], spins if seed is not None else [])
    made = _replaced(graph, node, source, call)
    node.replace_all_uses_with(getitem(graph, node, made, 0))
    graph.erase_node(node)
    return made


def follow(graph: Graph, plan: Plan, node: Node) -> Node | None:
    """Pointwise work on a product that nobody else reads, as far as it goes."""
    kernel = kernel_of(node, GemmKernel)
    if kernel is None or kernel.then is not None or len(node.users) != 1:
        return None
    chain = _chain(next(iter(node.users)), node)
    if chain is None:
        return None
    last, expr, order = chain
    given = Call.of(node)
    rows, cols = node.meta["val"][0].shape
    try:
        kinds = {each: shape_kind(each, rows, cols) or "" for each in order}
        inputs = tuple(Input(each.meta["val"].dtype, kinds[each]) for each in order)
        wanted = replace(kernel, then=Then(expr, last.meta["val"].dtype, inputs))
    except KernelError:
        return None
    anchor = last.next
    reads = [flat(graph, anchor, each, kinds[each], rows, cols) for each in order]
    made = _replaced(graph, anchor, node, replace(given, inputs=[*given.inputs, *reads], kernel=str(wanted)))
    for key in ("partitioner_tag", "recompute"):
        if key in last.meta:
            made.meta[key] = last.meta[key]
    result = getitem(graph, anchor, made, 0)
    shape = last.meta["val"].shape
    if len(shape) != 2:
        shape = [size if isinstance(size, int) else -1 for size in shape]
        result = insert_call(graph, anchor, torch.ops.aten.reshape.default, (result, shape))
    last.replace_all_uses_with(result)
    return made


def _chain(result: Node, gemm: Node) -> tuple[Node, Expr, list[Node]] | None:
    """(the last node taken in, its expression over x0: the product, and x1, ...; what they are)."""
    rows, cols = gemm.meta["val"][0].shape
    values: dict[Node, Expr] = {result: Load(0)}
    order: list[Node] = []
    last, matrices, taken = result, 0, [result]
    best: tuple[Node, Expr, list[Node]] | None = None
    while len(last.users) == 1:
        node = next(iter(last.users))
        found = meaning(node) if node.op == "call_function" else None
        if found is None or is_backward(node) != is_backward(gemm) or shape_kind(node, rows, cols) != "":
            break
        operands, apply = found
        others = [o for o in dict.fromkeys(operands) if isinstance(o, Node) and o not in values]
        kinds = [shape_kind(o, rows, cols) for o in others]
        matrices += sum(kind == "" for kind in kinds)
        if None in kinds or matrices > _MATRICES or reaches(gemm, others, taken):
            break
        for other in others:
            order.append(other)
            values[other] = Load(len(order))
        values[node] = apply(*(values[o] if isinstance(o, Node) else Number(float(o)) for o in operands))
        last = node
        taken.append(node)
        narrow = node.meta["val"].element_size() <= result.meta["val"].element_size()
        # A wider result is stored only where the graph hands it out: its readers would convert it in passing.
        if not isinstance(values[node], Load) and (narrow or all(user.op == "output" for user in node.users)):
            best = (node, values[node], list(order))
    return best
