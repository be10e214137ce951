"""Rewrite rules as values: which nodes a rule looks at, and what it makes of one of them. `None` means "not here".

    Rule("cast", "a quantisation is one launch", (quantize,), rewrite)

Rules run in the order in which they are listed, each over the whole graph; what they made is remembered with the rule's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch.fx import Graph, Node

# (graph, plan, node) -> the node that stands in its place, or None where the rule does not apply.
Rewriter = Callable[[Graph, Any, Node], "Node | None"]


@dataclass(frozen=True)
class Rule:
    """A rewrite: its name, why it is done, the operators it looks at, and what it does."""

    name: str
    reason: str
    heads: tuple[Any, ...]
    rewrite: Rewriter


def apply(graph: Graph, plan: Any, rules: Sequence[Rule]) -> None:
    """Runs rules over a graph. A node remembers the rules that shaped it in `meta["rules"]`."""
    for rule in rules:
        for node in list(graph.nodes):
            if node.target not in rule.heads or node._erased:
                continue
            before = node.meta.get("rules", ())
            made = rule.rewrite(graph, plan, node)
            if made is not None:
                made.meta["rules"] = (*made.meta.get("rules", before), rule.name)
        graph.eliminate_dead_code()


def reaches(source: Node, goals: Sequence[Node], without: Sequence[Node] = ()) -> bool:
    """True where a path of uses leads from `source` to one of `goals`, not through `without`: merging them would be a cycle."""
    flow = nx.DiGraph()
    flow.add_node(source)
    todo = [source]
    while todo:
        node = todo.pop()
        for user in node.users:
            if user not in without:
                if user not in flow:
                    todo.append(user)
                flow.add_edge(node, user)
    return any(goal in flow and nx.has_path(flow, source, goal) for goal in goals)
