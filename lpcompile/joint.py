"""The joint forward / backward graph as GEMM sites: which products belong together, which role each plays.

A site is one layer's GEMM triple. In the graph that AOTAutograd traces, a forward GEMM and its at most two backward GEMMs
share `meta["seq_nr"]`; `meta["partitioner_tag"]` tells forward from backward. Which of the two gradients a backward GEMM
computes follows from dataflow: it reads either the weight (then it is dgrad) or the input (then it is wgrad).

    fprop   y  = mm(x, wT)          x, w: the bases, behind any exchange of the last two axes
    dgrad   dx = mm(dy, w)          meets w
    wgrad   dw = mm(dyT, x)         meets x
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from lpcompile.errors import VerifyError
from lpcompile.recipe import Role

aten = torch.ops.aten

# GEMM op -> positions of (bias or None, left, right) in its arguments.
GEMMS: dict[Any, tuple[int | None, int, int]] = {
    aten.mm.default: (None, 0, 1),
    aten.bmm.default: (None, 0, 1),
    aten.addmm.default: (0, 1, 2),
    aten.baddbmm.default: (0, 1, 2),
}
GROUPED = tuple(getattr(aten, n).default for n in ("_grouped_mm", "_scaled_grouped_mm") if hasattr(aten, n))
_SWAPS = (aten.permute.default, aten.transpose.int, aten.t.default)
# Ops that hand on the values of their first argument unchanged, or only in another dtype.
VIEWS = (
    *_SWAPS,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.alias.default,
    aten.slice.Tensor,
    aten.select.int,
)
CASTS = (torch.ops.prims.convert_element_type.default, aten._to_copy.default, aten.clone.default)


@dataclass(frozen=True)
class Operand:
    """A GEMM operand: `node`, or `node` with its last two axes exchanged."""

    node: Node
    transposed: bool

    @staticmethod
    def of(node: Node) -> Operand:
        """Looks behind exchanges of the last two axes."""
        transposed = False
        while node.target in _SWAPS and swaps_last_two(node):
            source = node.args[0]
            assert isinstance(source, Node)
            node, transposed = source, not transposed
        return Operand(node, transposed)


def swaps_last_two(node: Node) -> bool:
    """True where a permute, transpose or t exchanges exactly the last two axes."""
    if node.target is aten.t.default:
        return len(node.meta["val"].shape) == 2
    rank = len(node.meta["val"].shape)
    if node.target is aten.transpose.int:
        dims = {int(d) % rank for d in node.args[1:3]}  # type: ignore[arg-type]
        return dims == {rank - 1, rank - 2}
    dims_list = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr,arg-type]
    return dims_list == [*range(rank - 2), rank - 1, rank - 2]


@dataclass
class Site:
    """One layer's GEMMs. `x` and `w` are the operands of fprop; `swapped` where the weight is the left one.

    weight: the parameter's name, or None where both operands are activations. problem: why its backward GEMMs cannot be told
    apart, or None.
    """

    key: str
    fqn: str
    nodes: dict[Role, Node]
    x: Operand
    w: Operand
    swapped: bool
    weight: str | None
    problem: str | None = None

    def size(self) -> tuple[Any, Any, Any]:
        """(M, N, K) of fprop: tokens, out-features, in-features (ints or SymInts)."""
        left, right = gemm_operands(self.nodes[Role.FPROP])
        m, k = left.meta["val"].shape[-2:]
        n = right.meta["val"].shape[-1]
        return (n, m, k) if self.swapped else (m, n, k)


@dataclass
class Joint:
    """All GEMMs of a graph: sites, and backward GEMMs that belong to none."""

    sites: list[Site]
    strays: list[Node] = field(default_factory=list)
    grouped: list[Node] = field(default_factory=list)


def gemm_operands(node: Node) -> tuple[Node, Node]:
    """(left, right) of a GEMM node."""
    _, left, right = GEMMS[node.target]
    found = node.args[left], node.args[right]
    assert isinstance(found[0], Node) and isinstance(found[1], Node)
    return found[0], found[1]


def gemm_bias(node: Node) -> Node | None:
    """The bias of an addmm or baddbmm."""
    position = GEMMS[node.target][0]
    bias = None if position is None else node.args[position]
    assert bias is None or isinstance(bias, Node)
    return bias


def is_backward(node: Node) -> bool:
    """True where AOTAutograd, or a pass of ours, put the node into the backward graph."""
    return node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def find_sites(graph: Graph, params: Mapping[str, str]) -> Joint:
    """The GEMM sites of a joint or inference graph. `params`: parameter name by placeholder name."""
    forward = [n for n in graph.nodes if n.target in GEMMS and not is_backward(n)]
    backward = [n for n in graph.nodes if n.target in GEMMS and is_backward(n)]
    counts: dict[str, int] = defaultdict(int)
    sites = [_forward_site(node, params, counts) for node in forward]
    joint = Joint(sites, grouped=[n for n in graph.nodes if n.target in GROUPED])
    by_number: dict[Any, list[Site]] = defaultdict(list)
    for site in sites:
        by_number[site.nodes[Role.FPROP].meta.get("seq_nr")].append(site)
    for node in backward:
        if not _claim(node, by_number[node.meta.get("seq_nr")]):
            joint.strays.append(node)
    return joint


def _forward_site(node: Node, params: Mapping[str, str], counts: dict[str, int]) -> Site:
    left, right = gemm_operands(node)
    weight, swapped = parameter_of(right, params), False
    if weight is None and (left_weight := parameter_of(left, params)) is not None:
        weight, swapped = left_weight, True
    fqn = module_name(node) or (weight or "").rpartition(".")[0] or weight or node.name
    counts[fqn] += 1
    key = fqn if counts[fqn] == 1 else f"{fqn}#{counts[fqn]}"
    a, b = Operand.of(left), Operand.of(right)
    x, w = (b, a) if swapped else (a, b)
    site = Site(key, fqn, {Role.FPROP: node}, x, w, swapped, weight)
    if x.node is w.node:
        site.problem = "both operands are the same tensor: its two gradients cannot be told apart"
    return site


def _claim(node: Node, sites: list[Site]) -> bool:
    """Gives a backward GEMM to the site whose forward operand it reads. False where there is none."""
    bases = {Operand.of(operand).node for operand in gemm_operands(node)}
    for site in sites:
        meets_x, meets_w = site.x.node in bases, site.w.node in bases
        if site.problem is None and meets_x and meets_w:
            site.problem = "a gradient GEMM reads both forward operands: its role is ambiguous"
        role = Role.WGRAD if meets_x else Role.DGRAD
        if (meets_x or meets_w) and role not in site.nodes:
            site.nodes[role] = node
            return True
        if meets_x and site.problem is not None and Role.DGRAD not in site.nodes:
            site.nodes[Role.DGRAD] = node
            return True
    return False


def parameter_of(node: Node, params: Mapping[str, str]) -> str | None:
    """The name of the parameter that `node` is a view, a cast or the decoded form of, or None."""
    while node.op == "call_function" and node.target in (*VIEWS, *CASTS, aten.view.dtype, torch.ops.lowprec.thaw.default):
        source = node.args[0]
        # A weight that is stored as codes is the parameter that holds them.
        source = source[0] if isinstance(source, (list, tuple)) else source
        assert isinstance(source, Node)
        node = source
    return params.get(node.name) if node.op == "placeholder" else None


# A decorator around forward (transformers has some) takes its model as the first of `*args`.
_ROOT = re.compile(r"^L\[['\"](?:args['\"]\]\[0\]|\w+['\"]\])\.?")


def clean_name(path: str) -> str:
    """A module or parameter path as Dynamo writes it, as the dotted name that the user knows."""
    path = _ROOT.sub("", path)
    # A wrapper that forwards attribute access (PEFT) is seen as its instance dictionary.
    path = path.replace("__dict__['_modules']", "_modules")
    path = re.sub(r"\._(?:modules|parameters|buffers)\[['\"]([^'\"]+)['\"]\]", r".\1", "." + path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    return path.strip(".").removeprefix("_orig_mod.").replace("._checkpoint_wrapped_module", "")


def module_name(node: Node) -> str:
    """Dotted name of the innermost module that a node came from ("" for the root or where nothing is known)."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    return clean_name(list(stack.values())[-1][0])


def size_hint(size: Any) -> int:
    """The traced value of an int or SymInt, without guarding on it; 1 where nothing is known."""
    if isinstance(size, torch.SymInt):
        hint = getattr(size.node, "hint", None)
        return int(hint) if hint is not None else 1024
    return 1 if size is None else int(size)


_COPIED = (
    "seq_nr",
    "partitioner_tag",
    "nn_module_stack",
    "fwd_nn_module_stack",
    "stack_trace",
    "recompute",
    "ac_graph_id",
    "autograd_backward",
    "custom",
)


def insert_call(graph: Graph, anchor: Node, target: Any, args: tuple[Any, ...]) -> Node:
    """A call before `anchor` that looks to every later pass as if it had been traced there; `meta["val"]` is computed."""
    with graph.inserting_before(anchor):
        node = graph.call_function(target, args)
    node.meta.update({key: anchor.meta[key] for key in _COPIED if key in anchor.meta})
    values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*values)
    return node


def verify(graph: Graph, after: str) -> None:
    """Raises VerifyError, naming the pass, where the graph breaks a rule that later stages rely on."""
    try:
        graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"after {after}: {error}") from error
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta and node.users:
            raise VerifyError(f"after {after}: {node.format_node()} has no meta['val']")
        if node.op == "call_function" and not is_backward(node) and node.meta.get("partitioner_tag") == "is_forward":
            late = [n.name for n in node.all_input_nodes if n.meta.get("partitioner_tag") == "is_backward"]
            if late:
                raise VerifyError(f"after {after}: forward node {node.name} reads backward values {', '.join(late)}")
        if node.target in GEMMS:
            for operand in gemm_operands(node):
                if _behind_views(operand).target is torch.ops.lowprec.dequantize.default:
                    raise VerifyError(
                        f"after {after}: {node.name} reads a dequantised tensor; the partitioner would save it in high "
                        "precision. Use lowprec.scaled_mm on the codes."
                    )


def _behind_views(node: Node) -> Node:
    while node.target in VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
