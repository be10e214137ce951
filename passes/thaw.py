"""Weights that are stored as codes feed their products directly.

    q = quantize(thaw(codes, cast), cast)     ->   q = codes                 what fprop asks for, where it was asked for
    q = quantize(thaw(codes, cast), other)         stays: decoded and quantised again at each step, in a tensor that lives shortly
    mm(x, thaw(codes, cast))                       stays: a layer in high precision

What stays decodes where it reads: in backward once more, so that nobody keeps a decoded weight from forward to backward.
"""

from __future__ import annotations

from collections.abc import Iterator

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
            if reader.args[1] == node.args[1] and reader.args[0] in (node, *_same_shape(node)):
                _use_codes(node, reader)
                plan.note_cast(reader, "weight read from its stored codes")
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


def _same_shape(node: Node) -> list[Node]:
    """Casts of dtype of a decoded weight: its codes stand for them as well."""
    return [user for user in node.users if user.target in CASTS]


def _use_codes(node: Node, reader: Node) -> None:
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
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
