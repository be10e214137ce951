"""One node per view: equal views and casts become one node, an exchange of axes undone vanishes.

Sites and shared quantisations are found by comparing nodes, so two nodes that hold the same values must be one.

    a = permute(w, [1, 0]);  b = permute(a, [1, 0])     ->   b is w
    v1 = view(x, s);  v2 = view(x, s)                   ->   v2 is v1

Obsolete when AOTAutograd hands over joint graphs that are free of common subexpressions.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from lpcompile.joint import CASTS, VIEWS, Operand, swaps_last_two
from lpcompile.pipeline import Plan

assert __name__ == "lpcompile.passes.canonicalize", "import it as lpcompile.passes, not as passes"


def canonicalize(graph: Graph, plan: Plan) -> None:
    """Merges equal views and casts and cancels pairs of exchanges."""
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (*VIEWS, *CASTS):
            continue
        replacement = _uncrossed(node)
        if replacement is None:
            key = (node.target, _hashable(node.args), _hashable(tuple(sorted(node.kwargs.items()))))
            replacement = seen.setdefault(key, node)
        if replacement is not node:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)


def _uncrossed(node: Node) -> Node | None:
    """What two exchanges in a row started from."""
    source = node.args[0]
    if not isinstance(source, Node) or node.target not in VIEWS[:3] or not swaps_last_two(node):
        return None
    if source.target not in VIEWS[:3] or not swaps_last_two(source):
        return None
    origin = Operand.of(node)
    return None if origin.transposed else origin.node


def _hashable(value: Any) -> Any:
    value = map_arg(value, lambda n: ("node", n.name))
    return repr(value)
