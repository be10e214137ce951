"""Weights that are stored as codes feed their products directly.

    q = quantize(thaw(codes, cast), cast)     ->   q = codes                 where the recipe asks for just this cast
    q = quantize(thaw(codes, cast), other)         stays: decoded and quantised again, for a short while
    mm(x, thaw(codes, cast))                       stays: a layer in high precision

What stays decodes where it reads: in backward once more, so that nobody keeps a decoded weight from forward to backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from lpcompile import freeze
from lpcompile.joint import CASTS, VIEWS, is_backward
from lpcompile.pipeline import Plan

assert __name__ == "lpcompile.passes.thaw", "import it as lpcompile.passes, not as passes"


def thaw(graph: Graph, plan: Plan) -> None:
    """Replaces quantisations of stored weights by the stored codes; marks every other decoding for recomputation."""
    for node in [n for n in graph.nodes if n.target is freeze.OP]:
        for reader in [n for n in _readers(node) if n.target is torch.ops.lowprec.quantize.default]:
            if reader.args[1] == node.args[1] and _weight_of(reader.args[0]) is node:
                plan.note_cast(reader, "weight read from its stored codes")
                _use_codes(node, reader, plan)
            else:
                plan.note_cast(reader, "weight decoded from its stored codes and quantised again")
                if is_backward(reader):
                    for made in (reader, *reader.users):
                        made.meta["partitioner_tag"] = "must_be_in_backward"
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    _report_kept(plan)
    graph.eliminate_dead_code()


def _readers(node: Node) -> Iterator[Node]:
    """Every node that reads a value behind views and casts of dtype."""
    for user in list(node.users):
        yield user
        if user.target in (*VIEWS, *CASTS):
            yield from _readers(user)


def _weight_of(node: Any) -> Any:
    """The value behind casts of dtype, for which codes stand as well."""
    while isinstance(node, Node) and node.target in (*CASTS, torch.ops.aten.alias.default):
        node = node.args[0]
    return node


def _use_codes(node: Node, reader: Node, plan: Plan) -> None:
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    requantize = torch.ops.lowprec.requantize.default
    for user in {user for part in reader.users for user in part.users if user.target is requantize}:
        plan.note_cast(user, "weight quantised again from its stored codes")
    for part in list(reader.users):
        stored = parts[part.args[1]]  # type: ignore[index]
        assert isinstance(stored, Node)
        part.replace_all_uses_with(stored)


def _report_kept(plan: Plan) -> None:
    for decision in plan.decisions:
        if not decision.converted and decision.site is not None and _decoded(decision.site.w.node):
            decision.reason += "; weight decoded from its stored codes"


def _decoded(node: Node) -> bool:
    while node.target in (*VIEWS, *CASTS) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.target is freeze.OP
