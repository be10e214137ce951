"""Quantisations and products as Kernels, in the forms in which they meet.

An operand is a Cast's output in some form: as it is, transposed (the contraction last in memory, where 8-bit instructions want
it), or decoded where the target has no instruction for its codes: to FP8 where that bears the values exactly (`carried`), else
to bf16. What backward reads of forward is always codes and scales; where it needs them decoded, a kernel that decodes stands
just before the product.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from lpcompile import fused
from lpcompile.carrier import carrying
from lpcompile.errors import KernelError
from lpcompile.joint import insert_call, is_backward, parameter_of
from lpcompile.kernel import CastKernel, DecodeKernel, GemmKernel, Input, Output, RequantKernel, dtype_name
from lpcompile.ops import parse_cast, parse_dot
from lpcompile.pipeline import Plan
from lpcompile.product import Product
from lpcompile.recipe import Cast, Dot, DotOperand, decoded_parts, folds

assert __name__ == "lpcompile.passes.forms", "import it as lpcompile.passes, not as passes"

_ops = torch.ops.lowprec
FUSED = _ops.fused.default


# ---- nodes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """The arguments of a fused node, by name."""

    inputs: list[Node]
    kernel: str
    sizes: list[Any]
    seed: Node | None
    uses: list[int]
    spins: list[int]

    @staticmethod
    def of(node: Node) -> Call:
        defaults: tuple[Any, ...] = ([], "", [], None, [], [])
        values: tuple[Any, ...] = (*node.args, *defaults[len(node.args) :])
        inputs, kernel, sizes, seed, uses, spins = values
        return Call(list(inputs), str(kernel), list(sizes), seed, list(uses), list(spins))

    def args(self) -> tuple[Any, ...]:
        return (self.inputs, self.kernel, self.sizes, self.seed, self.uses, self.spins)


def kernel_of(node: Node, family: type) -> Any:
    """The Kernel of a fused node where it belongs to a family; None elsewhere."""
    if node.target is not FUSED:
        return None
    kernel = fused.parse_kernel(str(node.args[1]))
    return kernel if isinstance(kernel, family) else None


def getitem(graph: Graph, anchor: Node, made: Node, index: int, like: Node | None = None) -> Node:
    """One result of a node, with what the report knows of `like`."""
    part = insert_call(graph, anchor, operator.getitem, (made, index))
    if like is not None and "lowprec" in like.meta:
        part.meta["lowprec"] = like.meta["lowprec"]
    for key in ("partitioner_tag", "recompute"):
        if key in made.meta:
            part.meta[key] = made.meta[key]
    return part


def _insert(graph: Graph, anchor: Node, call: Call, backward: bool, info: dict[str, Any] | None) -> Node:
    node = insert_call(graph, anchor, FUSED, call.args())
    node.meta["rules"] = ("product",)  # which asks for the form
    if backward:
        node.meta["partitioner_tag"] = "must_be_in_backward"
    if info is not None:
        node.meta["lowprec"] = info
    return node


def parts_of(node: Node) -> dict[int, list[Node]]:
    """The getitem nodes of each result."""
    found: dict[int, list[Node]] = {}
    for user in node.users:
        if user.target is operator.getitem:
            found.setdefault(int(user.args[1]), []).append(user)  # type: ignore[arg-type]
    return found


def _random(args: Sequence[Any], kernel_outputs: int = 1) -> tuple[Node | None, list[int], list[int]]:
    """(seed, uses, spins) of a quantize's or requantize's trailing arguments."""
    if not args:
        return None, [], []
    seed, use, spins = args
    return seed, [use] * kernel_outputs, list(spins) * kernel_outputs


# ---- products ----------------------------------------------------------------------------------------------------


def product(graph: Graph, plan: Plan, node: Node) -> Node | None:
    """scaled_mm -> gemm, its operands in the form that the target multiplies."""
    arguments: tuple[Any, ...] = node.args
    left, right, bias, text, size, dtype = arguments
    if len(node.meta["val"].shape) != 2 or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    dot = parse_dot(str(text))
    quants = [side.cast.quant if side.cast is not None else None for side in (dot.left, dot.right)]
    decoded = plan.target.native(*quants) is None
    fp8 = plan.target.carries(*quants) and _carried(node, left, dot.left) and _carried(node, right, dot.right)
    sides = [
        _operand(graph, plan, node, list(parts), side, is_left, (decoded, fp8))
        for parts, side, is_left in ((left, dot.left, True), (right, dot.right, False))
    ]
    inputs = [*sides[0][0], *sides[1][0], *([] if bias is None else [bias])]
    kernel = GemmKernel(Dot(sides[0][1], sides[1][1]), dtype, bias is not None)
    made = insert_call(graph, node, FUSED, (inputs, str(kernel), list(size or [])))
    made.meta["lowprec"] = node.meta["lowprec"]
    node.replace_all_uses_with(getitem(graph, node, made, 0))
    graph.erase_node(node)
    return made


def _carried(node: Node, parts: Sequence[Node], side: DotOperand) -> bool:
    """True where FP8 can bear an operand: its scale says nothing of rows that were mixed, and what forward saved is decoded
    to 16 bits first, which range matching's factor does not fit in."""
    cast = side.cast
    assert cast is not None
    made = parts[0].args[0] if parts[0].target is operator.getitem else None
    quantises = (_ops.quantize.default, _ops.requantize.default)
    here = isinstance(made, Node) and made.target in quantises and is_backward(made) is is_backward(node)
    return cast.rotations[1 - cast.axis] is None and (here or not cast.quant.has_outer)


def _operand(
    graph: Graph, plan: Plan, node: Node, parts: list[Node], side: DotOperand, left: bool, wanted: tuple[bool, bool]
) -> tuple[list[Node], DotOperand]:
    """The parts of one operand and how the product reads them, in the form that is wanted: (decoded, borne by FP8)."""
    decoded, fp8 = wanted
    if side.cast is None:
        return parts, side
    k_axis = (1 if left else 0) ^ int(side.transposed)
    turn = side.cast.rotations[side.cast.axis]
    carrier = carrying(turn.block if turn is not None else 1) if fp8 else None
    output = Output(side.cast, k_axis == 0 and (fp8 or not decoded), decoded=decoded, carrier=carrier)
    origin = parts[0].args[0] if parts[0].target is operator.getitem else None
    made = None
    if isinstance(origin, Node) and origin.target in (_ops.quantize.default, _ops.requantize.default):
        made = _formed(graph, plan, node, origin, output, parts, _columns(node, left))
    elif output.decoded:
        made = _decoded(graph, node, parts, output, _columns(node, left))
    if made is None:
        return parts, side
    operand = DotOperand(fused.written_cast(output), side.transposed ^ output.transposed, decoded and not fp8)
    return made, operand


def _formed(
    graph: Graph, plan: Plan, node: Node, origin: Node, output: Output, parts: list[Node], cols: Any
) -> list[Node] | None:
    """The parts of a quantisation in another form, made where its reader needs them; None for the form it has."""
    late = is_backward(node) and not is_backward(origin)
    weight = origin.target is _ops.quantize.default and parameter_of(origin.args[0], plan.params) is not None  # type: ignore[arg-type]
    if output.decoded and late and not weight:
        return _decoded(graph, node, parts, output, cols)
    # Backward quantises a weight anew: it is alive anyway, and its codes would be kept in between for nothing.
    again = late and weight and not output.cast.random
    if not again and not output.transposed and not output.decoded:
        return None
    form = (str(output), again)
    forms = origin.meta.setdefault("forms", {})
    if form not in forms:
        anchor = node if again else origin
        made = _insert(graph, anchor, _call(origin, output), again, origin.meta.get("lowprec"))
        if weight and output.decoded and not output.cast.random:
            # The partitioner merges equal calls: without this, backward would be given the values that forward decoded.
            made.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        info = {**origin.meta.get("lowprec", {})}
        found = []
        for index, name in enumerate(output.parts):
            part = getitem(graph, anchor, made, index)
            part.meta["lowprec"] = {**info, "part": name}
            found.append(part)
        forms[form] = found
    return list(forms[form])


def _call(origin: Node, output: Output) -> Call:
    """The fused call that does what a quantize or a requantize does, in one form."""
    if origin.target is _ops.quantize.default:
        x, _, *random = origin.args
        assert isinstance(x, Node)
        return Call([x], str(CastKernel((output,), x.meta["val"].dtype)), [], *_random(random))
    arguments: tuple[Any, ...] = origin.args
    parts, source, _, cols, dtype, *random = arguments
    kernel = RequantKernel(parse_cast(str(source)), (output,), dtype)
    return Call(list(parts), str(kernel), [cols], *_random(random))


def _decoded(graph: Graph, node: Node, parts: list[Node], output: Output, cols: Any) -> list[Node] | None:
    """The values of codes, decoded just before the product that reads them. None where their columns are not known."""
    made_by, quant, late = output.cast, output.cast.quant, is_backward(node)
    if not isinstance(cols, int):
        if quant.packed:
            return None
        cols = insert_call(graph, node, torch.ops.aten.sym_size.int, (parts[0], 1))
    if output.carrier is not None:
        # What is decoded is exact in bf16, and so is the carrier of that.
        again = Output(Cast(output.carrier, made_by.axis), output.transposed)
        kernel = RequantKernel(made_by, (again,), torch.bfloat16)
        made = _insert(graph, node, Call(parts, str(kernel), [cols], None, [], []), late, None)
        return [getitem(graph, node, made, index) for index in range(len(again.parts))]
    named = dict(zip(quant.parts, parts, strict=True))
    inputs = [parts[0], *([parts[1]] if folds(quant) else [])]
    values = _insert(graph, node, Call(inputs, str(DecodeKernel(made_by)), [cols], None, [], []), late, None)
    named["values"] = getitem(graph, node, values, 0)
    return [named[name] for name in decoded_parts(quant)]


def _columns(node: Node, left: bool) -> Any:
    """The unpacked columns in storage of one operand of a scaled_mm (int or SymInt)."""
    values: Any = torch.fx.node.map_arg(node.args[:5], lambda n: n.meta["val"])
    p = Product.of(values[0], values[1], parse_dot(values[3]), values[4])
    side = p.left if left else p.right
    return p.k if side.k_axis == 1 else p.m if left else p.n


# ---- casts -------------------------------------------------------------------------------------------------------


def _supported(x: Node) -> bool:
    value = x.meta["val"]
    try:
        dtype_name(value.dtype)
    except KernelError:
        return False
    return len(value.shape) == 2


def cast(graph: Graph, plan: Plan, node: Node) -> Node | None:
    """quantize -> cast, in the form it has."""
    if not _supported(node.args[0]):  # type: ignore[arg-type]
        return None
    return _replaced(graph, node, _call(node, Output(parse_cast(str(node.args[1])))))


def requant(graph: Graph, plan: Plan, node: Node) -> Node | None:
    """requantize -> requant."""
    if len(node.args[0][0].meta["val"].shape) != 2:  # type: ignore[index,union-attr]
        return None
    return _replaced(graph, node, _call(node, Output(parse_cast(str(node.args[2])))))


def _replaced(graph: Graph, node: Node, call: Call) -> Node:
    made = insert_call(graph, node, FUSED, call.args())
    made.meta.update({key: node.meta[key] for key in ("lowprec", "partitioner_tag", "recompute") if key in node.meta})
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return made


def share(graph: Graph, plan: Plan, node: Node) -> Node | None:
    """All casts of one tensor in one phase become one, which stands where the first of its readers needs it."""
    kernel = kernel_of(node, CastKernel)
    if kernel is None or not kernel.plain:
        return None
    x = Call.of(node).inputs[0]
    late = is_backward(node)
    group = [user for user in x.users if (k := kernel_of(user, CastKernel)) and k.plain and is_backward(user) == late]
    position = {each: index for index, each in enumerate(graph.nodes)}
    group.sort(key=position.__getitem__)
    if len(group) < 2 or group[0] is not node:
        return None
    readers = [reader for each in group for part in each.users for reader in part.users]
    calls = [Call.of(each) for each in group]
    seed = next((call.seed for call in calls if call.seed is not None), None)
    anchor = min(readers, key=position.__getitem__, default=node)
    if seed is not None and position[seed] > position[anchor]:
        return None
    outputs = [output for each in group for output in kernel_of(each, CastKernel).outputs]
    made_call = Call([x], str(CastKernel(tuple(outputs), kernel.dtype, kernel.inputs)), [], seed, *streams(calls, seed))
    made = insert_call(graph, anchor, FUSED, made_call.args())
    made.meta.update({key: node.meta[key] for key in ("lowprec", "partitioner_tag", "recompute", "rules") if key in node.meta})
    first = 0
    for each in group:
        for index, parts in sorted(parts_of(each).items()):
            for part in parts:
                part.replace_all_uses_with(getitem(graph, anchor, made, first + index, part))
        first += sum(len(output.parts) for output in kernel_of(each, CastKernel).outputs)
    for each in group:
        for part in list(each.users):
            graph.erase_node(part)
        graph.erase_node(each)
    return made


def streams(calls: Sequence[Call], seed: Node | None) -> tuple[list[int], list[int]]:
    """The uses and spins of several single-output calls, one after the other."""
    if seed is None:
        return [], []
    uses = [use for call in calls for use in (call.uses or [0])]
    spins = [spin for call in calls for spin in (call.spins or [0, 0])]
    return uses, spins


def inputs_of(kernel: CastKernel) -> tuple[Input, ...]:
    """What a cast reads."""
    return kernel.inputs
