"""Where the tile that is quantised comes from: inputs and a prologue, or the codes of an earlier cast."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from lpcompile.codegen.extents import Extent
from lpcompile.codegen.fragments import Fragments
from lpcompile.codegen.function import Function
from lpcompile.codegen.views import TILES, Blocks, origin, stored
from lpcompile.errors import KernelError
from lpcompile.expr import Call, Expr, Load, Number, nodes
from lpcompile.formats import E8M0, Int
from lpcompile.kernel import CastKernel, DecodeKernel, RequantKernel
from lpcompile.recipe import Cast, folds

assert __name__ == "lpcompile.codegen.origin", "import it as lpcompile.codegen, not as codegen"


@dataclass(frozen=True)
class Origin:
    """`load_x(row0, col0, <tensors>)` and what it reads: (name, dtype as the kernel sees it, dtype and shape as it comes)."""

    function: Function
    tensors: tuple[Read, ...]
    dtype: torch.dtype  # of the tile
    tiles: tuple[str, ...] = TILES[:1]  # what kernels call the results
    computed: bool = False  # and not read as it is


@dataclass(frozen=True)
class Read:
    """A tensor that kernels read. shape: as text, for examples."""

    name: str
    dtype: torch.dtype  # as it comes
    seen: torch.dtype  # as the kernel sees it
    shape: tuple[Extent, ...]


class _Place:
    """Loads of tiles of one matrix size. eights: with eight rows in a thread."""

    def __init__(
        self, tile: tuple[int, int], extents: tuple[Extent, Extent], fragments: Fragments, eights: bool = False
    ) -> None:
        self.tile, self.extents, self.fragments, self.eights = tile, extents, fragments, eights

    def vector(self, name: str, axis: int) -> str:
        """One number a row (axis 0) or a column, beside a tile. As a vector: as a matrix of one row it would be given a layout
        that suits its few numbers, and the tile would be moved into that."""
        start, extent, size = ("row0", "col0")[axis], self.extents[axis], self.tile[axis]
        checked = not extent.divides(size)
        load = self.fragments.add(
            "load_vector_to" if checked else "load_vector",
            f'''
def load_vector{"_to" if checked else ""}(vector, LENGTH: tl.constexpr, start{", size" if checked else ""}):
    """Reads a part of a vector{" as far as it reaches" if checked else ""}."""
    place = start + tl.arange(0, LENGTH)
    return tl.load(vector + place{", mask=place < size, other=0.0" if checked else ""})
''',
        )
        call = f"{load}({name}, {size}, {start}{f', {extent.text}' if checked else ''})"
        return f"{call}{('[:, None]', '[None, :]')[axis]}"

    def load(self, name: str, block: tuple[int, int] = (1, 1), width: int = 1) -> str:
        """A tile of a matrix with one number a block; width: columns that share a number in memory (packed codes)."""
        counts = Blocks.of(self.tile, block).counts
        rows, cols = (
            length != 0 and not extent.divides(size)
            for length, extent, size in zip(block, self.extents, self.tile, strict=True)
        )
        sizes = [extent.blocks(length).text for extent, length in zip(self.extents, (block[0], block[1] * width), strict=True)]
        row, col = origin((block[0], block[1] * width))
        call = f"{name}, {counts[0]}, {counts[1] // width}, {row}, {col}, {', '.join(sizes if rows else sizes[1:])}"
        load = self.fragments.load_eights if self.eights and block == (1, 1) else self.fragments.load
        return f"{load(rows, cols)}({call})"

    def zeroed(self, name: str, function: Function) -> list[str]:
        """Lines that make a tile 0 beyond the matrix: there a prologue need not be."""
        lines = []
        axes = zip(("row0", "col0"), self.extents, self.tile, ("[:, None]", "[None, :]"), strict=True)
        for start, extent, size, index in axes:
            if not extent.divides(size):
                lines.append(f"{name} = tl.where({start} + tl.arange(0, {size}){index} < {extent.text}, {name}, 0.0)")
        return lines


def emit_origin(
    kernel: CastKernel | RequantKernel | DecodeKernel,
    tile: tuple[int, int],
    extents: tuple[Extent, Extent],
    fragments: Fragments,
    name: str = "load_x",
    eights: bool = False,
) -> Origin:
    """Writes the function that loads a tile, called `name`. Raises KernelError for what is not generated."""
    place = _Place(tile, extents, fragments, eights and isinstance(kernel, CastKernel))
    if isinstance(kernel, CastKernel):
        return _prologue(kernel, place, name)
    dtype = kernel.dtype if isinstance(kernel, RequantKernel) else torch.bfloat16
    return _decoded(kernel.source, dtype, isinstance(kernel, RequantKernel), place, name)


# ---- prologues ---------------------------------------------------------------------------------------------------


def _prologue(kernel: CastKernel, place: _Place, name: str) -> Origin:
    dtype = kernel.dtype
    tensors = []
    loads = []
    for index, each in enumerate(kernel.inputs):
        variable = f"x{index}"
        rows, cols = place.extents
        shape = {"": (rows, cols), "r": (rows,), "c": (cols,)}[each.vector]
        tensors.append(Read(variable, each.dtype, each.dtype, shape))
        loads.append(place.vector(variable, "rc".index(each.vector)) if each.vector else place.load(variable))
    made = "; ".join(map(str, kernel.prologues))
    function = Function(name, f"The tile at (row0, col0) of {made}.", ("row0", "col0"))
    function.take(*(each.name for each in tensors))
    if kernel.plain:
        function.doc = "The tile at (row0, col0) of what is quantised."
        function.add(f"return {loads[0]}")
        return Origin(function, tuple(tensors), dtype)
    function.add(*(f"x{index} = {load}.to(tl.float32)" for index, load in enumerate(loads)))
    values = _expressions(kernel.prologues, place.fragments, function)
    tiles = TILES[: len(values)]
    for tile, value in zip(tiles, values, strict=True):
        function.add(f"{tile} = {place.fragments.rounded(value, kernel.dtype)}", *place.zeroed(tile, function))
    function.add(f"return {', '.join(tiles)}")
    return Origin(function, tuple(tensors), dtype, tiles, computed=True)


_INFIX = {"add": "+", "sub": "-", "mul": "*"}


def _expressions(exprs: tuple[Expr, ...], fragments: Fragments, function: Function) -> list[str]:
    """Adds one line a node, in the reference's order; returns the variables of the results."""
    names: dict[Expr, str] = {}
    exprs = tuple(map(_with_logistics, exprs))
    for node in dict.fromkeys(node for expr in exprs for node in nodes(expr)):
        if isinstance(node, Load):
            names[node] = f"x{node.index}"
        elif isinstance(node, Number):
            names[node] = _number(node.value)
        else:
            name = f"t{sum(isinstance(each, Call) for each in names)}"
            function.add(f"{name} = {_call(node, [names[arg] for arg in node.args], fragments)}")
            names[node] = name
    return [names[expr] for expr in exprs]


@functools.cache
def _with_logistics(expr: Expr) -> Expr:
    """x / (exp(-x) + 1), as PyTorch takes SiLU apart, is one call again: those are made of fewer instructions."""
    if not isinstance(expr, Call):
        return expr
    args = tuple(map(_with_logistics, expr.args))
    match expr.op, args:
        case "div", (over, Call("add", (Call("exp", (Call("neg", (x,)),)), Number(1.0)))) if over in (x, Number(1.0)):
            return Call("silu" if over == x else "sigmoid", (x,))
        case "add", (Number(1.0), Call("exp") as power):
            return Call("add", (power, Number(1.0)))
    return Call(expr.op, args)


def _number(value: float) -> str:
    narrow = float(torch.tensor(value, dtype=torch.float32))
    return repr(narrow) if abs(narrow) < float("inf") else f'float("{narrow}")'


def _call(node: Call, args: list[str], fragments: Fragments) -> str:
    if node.op in _INFIX:
        return f"{args[0]} {_INFIX[node.op]} {args[1]}"
    return f"{_operation(node.op, fragments)}({', '.join(args)})"


# Bodies of the operations that Triton has no operator for, as the reference writes them.
_OPERATIONS = {
    "div": ("x, y", "tl.div_rn(x, y)"),
    "neg": ("x", "-x"),
    "abs": ("x", "tl.abs(x)"),
    "exp": ("x", "tl.exp(x)"),
    "erf": ("x", "tl.erf(x)"),
    "sqrt": ("x", "tl.sqrt_rn(x)"),
    "reciprocal": ("x", "tl.div_rn(1.0, x)"),
    "rsqrt": ("x", "tl.div_rn(1.0, tl.sqrt_rn(x))"),
    "relu": ("x", "tl.where(x < 0, 0.0, x)"),
    "gelu": ("x", "x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))"),
    # NaN in either goes through, as in torch.
    "maximum": ("x, y", "tl.where((x > y) | (x != x), x, y)"),
    "minimum": ("x, y", "tl.where((x < y) | (x != x), x, y)"),
}


def _operation(op: str, fragments: Fragments) -> str:
    if op in ("bf16", "f16"):
        dtype = torch.bfloat16 if op == "bf16" else torch.float16
        value = f"{fragments.rounded('x', dtype)}.to(tl.float32)"
        return fragments.add(f"through_{op}", f'def through_{op}(x):\n    """Rounded to {op}."""\n    return {value}')
    if op == "tanh":
        return _tanh(fragments)
    if op in ("sigmoid", "silu"):
        return _logistic(op, fragments)
    if op not in _OPERATIONS:
        raise KernelError(f"{op} in a prologue is not generated")
    arguments, value = _OPERATIONS[op]
    # A name of Triton's own must not be hidden.
    name = f"{op}_of"
    return fragments.add(name, f"def {name}({arguments}):\n    return {value}")


def _logistic(op: str, fragments: Fragments) -> str:
    """1 / (1 + exp(-x)) and x times that. An exponential is not correctly rounded: a quotient that is would buy nothing."""
    if fragments.interpreted:
        value = f"{'x' if op == 'silu' else '1.0'} / (1.0 + tl.exp(-x))"
        return fragments.add(f"{op}_of", f"def {op}_of(x):\n    return {value}")
    sigmoid = fragments.add(
        "sigmoid_of",
        '''
def sigmoid_of(x):
    """1 / (1 + exp(-x)) by the hardware's estimates, which are within 2 ulp: exp(-x) = 2^(-x / ln 2)."""
    power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x * -1.4426950408889634], tl.float32, True, 1)
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [1.0 + power], tl.float32, True, 1)
''',
    )
    return sigmoid if op == "sigmoid" else fragments.add("silu_of", f"def silu_of(x):\n    return x * {sigmoid}(x)")


def _tanh(fragments: Fragments) -> str:
    return fragments.add(
        "tanh_of",
        '''
def tanh_of(x):
    """By the exponential of -2 |x|, by a series near 0: within a few ulp."""
    e = tl.exp(-2.0 * tl.abs(x))
    value = tl.div_rn(1.0 - e, 1.0 + e)
    square = x * x
    series = 1.0 + square * (-0.3333333333 + square * (0.1333333333 + square * -0.0539682540))
    return tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0, -value, value))
''',
    )


# ---- codes -------------------------------------------------------------------------------------------------------


def _decoded(source: Cast, dtype: torch.dtype, outer: bool, place: _Place, name: str) -> Origin:
    """outer: times the outer scale as well (a Requant); without it a Decode, which takes block scales only where they fold."""
    quant, fragments = source.quant, place.fragments
    block = quant.block.along(source.axis)
    scaled = outer or folds(quant)
    native = fragments.native(quant.elem)
    rows, cols = place.extents
    packed = 2 if quant.packed else 1
    codes = Read("codes", quant.storage, stored(quant.storage, native), (rows, cols.blocks(packed)))
    tensors = [codes]
    function = Function(name, f"The tile at (row0, col0) of what {source} stands for.", ("row0", "col0"), ["codes"])
    code = place.load("codes", width=packed)
    if quant.packed:
        code = f"{fragments.unpack_nibbles(isinstance(quant.elem, Int))}({code})"
    function.add(f"x = {fragments.decode(quant.elem)}({code})")
    if scaled:
        blocks = Blocks.of(place.tile, block)
        seen = stored(quant.scale_storage, fragments.converts_fp8)
        extents = rows.blocks(block[0]), cols.blocks(block[1])
        tensors.append(Read("scales", quant.scale_storage, seen, extents))
        function.take("scales")
        scale = place.load("scales", block)
        if quant.scale == E8M0 or quant.outer is not None:
            scale = f"{fragments.decode_scale(quant)}({scale})"
        function.add(f"x = {blocks.apart('x')} * {blocks.beside(scale)}")
        if blocks.shape != blocks.tile:
            function.add(f"x = {blocks.together('x')}")
    if outer and quant.has_outer:
        tensors.append(Read("outers", torch.float32, torch.float32, (Extent.number(1), Extent.number(1))))
        function.take("outers")
        function.add("x = x * tl.load(outers)")
    if outer and quant.masked:
        tensors.append(Read("masks", torch.uint8, torch.uint8, (rows, cols.blocks(8))))
    function.add(f"return {fragments.rounded('x', dtype)}")
    return Origin(function, tuple(tensors), dtype)


def emit_plain(
    tensor: str, dtype: torch.dtype, tile: tuple[int, int], extents: tuple[Extent, Extent], fragments: Fragments, name: str
) -> Origin:
    """An origin that reads a matrix as it is."""
    function = Function(name, f"The tile of {tensor} at (row0, col0).", ("row0", "col0"), [tensor])
    function.add(f"return {_Place(tile, extents, fragments).load(tensor)}")
    return Origin(function, (Read(tensor, dtype, dtype, extents),), dtype)
