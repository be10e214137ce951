"""A weight that nobody trains is quantised once and not at each step.

    q = quantize(w)                          ->   q = quantize_once(w)              w: frozen (PEFT), or any parameter of an
    q = quantize(view(bfloat16(w)))          ->   q = quantize_once(w, shape, bf16)    inference graph

The operator takes the parameter itself, so that a view or an autocast in between is done once as well. It stands where the
codes are read: backward asks for them again instead of keeping them, which costs a look into the cache.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from lpcompile import once
from lpcompile.joint import CASTS, insert_call, is_backward
from lpcompile.ops import parse_cast
from lpcompile.pipeline import Plan

assert __name__ == "lpcompile.passes.hoist", "import it as lpcompile.passes, not as passes"

aten = torch.ops.aten

# Views that `reshape` repeats: all but those that exchange axes or leave elements out.
_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.alias.default,
)


def hoist(graph: Graph, plan: Plan) -> None:
    """Turns the deterministic casts of frozen parameters into `quantize_once`."""
    for node in [n for n in graph.nodes if n.target is torch.ops.lowprec.quantize.default]:
        weight = _weight(node.args[0])
        if weight is None or weight.name not in plan.frozen or parse_cast(node.args[1]).random:
            continue
        if weight.meta["val"].is_cuda and torch._inductor.config.triton.cudagraphs:
            plan.notes.append("frozen weights are quantised at each step: CUDA graphs keep their own memory")
            return
        _replace(graph, node, weight, plan)
    graph.eliminate_dead_code()


def _weight(node: object) -> Node | None:
    """The placeholder that a value is, behind reshapes and casts of dtype."""
    while isinstance(node, Node) and node.target in (*_RESHAPES, *CASTS):
        node = node.args[0]
    return node if isinstance(node, Node) and node.op == "placeholder" else None


def _replace(graph: Graph, node: Node, weight: Node, plan: Plan) -> None:
    source = node.args[0]
    assert isinstance(source, Node)
    value = source.meta["val"]
    call = insert_call(graph, node, once.OP, (weight, node.args[1], list(value.shape), value.dtype))
    call.meta["lowprec"] = node.meta["lowprec"]
    parts = list(node.users)
    node.replace_all_uses_with(call)
    for made in (call, *parts):
        if is_backward(node):
            made.meta["partitioner_tag"] = "must_be_in_backward"
        elif any(is_backward(user) for part in parts for user in part.users):
            made.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    plan.note_cast(call, "weight quantised once")
