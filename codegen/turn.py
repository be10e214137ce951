"""Rotations of a tile: a tensor-core product with the small matrix of +-1, which bears the signs as well."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lpcompile.codegen.fragments import Fragments
from lpcompile.codegen.function import Function
from lpcompile.codegen.noise import signs
from lpcompile.codegen.views import View
from lpcompile.errors import KernelError
from lpcompile.recipe import Rotation, Signs

assert __name__ == "lpcompile.codegen.turn", "import it as lpcompile.codegen, not as codegen"

_LARGEST = 128  # beyond that the matrix leaves no room for a tile


def fits(rotation: Rotation | None) -> bool:
    """True where a rotation is one product of a tile with a small matrix."""
    return rotation is None or (16 <= rotation.block <= _LARGEST and rotation.block & (rotation.block - 1) == 0)


def emit_turn(view: View, dtype: torch.dtype, fragments: Fragments) -> tuple[str, list[str]]:
    """(text, arguments after the tile) of `turn_<index>(x, ...)`: a view's tile turned along both axes, rounded to `dtype`."""
    if not all(map(fits, view.rotations)):
        raise KernelError(f"{view.output}: rotations of that size need a kernel of their own")
    rotations = view.output.cast.rotations
    arguments = [f"spin_{axis}" for axis in (0, 1) if _drawn(rotations[axis]) and not _from_memory(rotations[axis])]
    arguments = (["seed"] if arguments else []) + arguments
    arguments += [f"matrix_{axis}" for axis in (0, 1) if _from_memory(rotations[axis])]
    lines: list[str] = []
    # The order of the reference: along the columns of the matrix that is read, then along its rows.
    for axis in (1, 0):
        rotation = view.output.cast.rotations[axis]
        if rotation is not None:
            lines += _along(view, axis, rotation, dtype, fragments)
    body = "\n".join(f"    {line}" for line in [*lines, "return x"])
    text = f'''@triton.jit
def turn_{view.index}({", ".join(["x", *arguments])}):
    """The tile, turned as {view.output} asks, and rounded."""
{body}'''
    return text, arguments


@dataclass(frozen=True)
class DrawnMatrix:
    """A kernel that writes the matrix of a rotation, which others would otherwise draw and make for each of their tiles."""

    name: str
    block: int
    function: Function


def emit_drawn(view: View, dtype: torch.dtype, fragments: Fragments) -> list[DrawnMatrix]:
    """The kernels that must run before a view's tile is turned."""
    found = []
    for axis, rotation in enumerate(view.output.cast.rotations):
        if rotation is not None and _from_memory(rotation):
            name, spin, size = f"matrix_{axis}_{view.index}", f"spin_{axis}_{view.index}", rotation.block
            function = Function(f"draw_{axis}_{view.index}", f"The matrix of {rotation}.", (), [name, "seed", spin])
            drawn = signs(fragments, rotation, "seed", spin, size)
            made = matrix_fragment(fragments, _gathers(view, axis, rotation, dtype, fragments))
            function.add(f"matrix = {made}({size}, {size}) * {drawn}[:, None]")
            function.add(f"tl.store({name} + {_square(size)}, matrix.to(tl.bfloat16))")
            found.append(DrawnMatrix(name, size, function))
    return found


def _square(size: int) -> str:
    return f"tl.arange(0, {size})[:, None] * {size} + tl.arange(0, {size})[None, :]"


def _from_memory(rotation: Rotation | None) -> bool:
    return rotation is not None and _drawn(rotation) and rotation.block >= 32


def _drawn(rotation: Rotation | None) -> bool:
    return rotation is not None and rotation.signs is Signs.DRAWN


def _along(view: View, axis: int, rotation: Rotation, dtype: torch.dtype, fragments: Fragments) -> list[str]:
    """Turns `x` along an axis of the matrix that is read, and rounds it to `dtype`."""
    block, size = rotation.block, max(rotation.block, 16)
    flip = axis != (0 if view.output.transposed else 1)
    tile = view.tile[::-1] if flip else view.tile
    gathers = _gathers(view, axis, rotation, dtype, fragments)
    if tile[1] % size:
        raise KernelError(f"{view.output}: a tile of {tile[1]} has no whole blocks of {size} to turn")
    matrix = f"{matrix_fragment(fragments, gathers)}({block}, {size})"
    if _from_memory(rotation):
        matrix = f"tl.load(matrix_{axis} + {_square(size)})"
    elif rotation.signs is not Signs.NONE:
        matrix += f" * {signs(fragments, rotation, 'seed', f'spin_{axis}', size)}[:, None]"
    scale = 1 / math.sqrt(block)

    def product(value: str, matrix: str, left: bool = False) -> str:
        name = product_fragment(dtype, fragments, left)
        turned = fragments.rounded(f"({name}({value}, {matrix}) * {scale!r})", dtype, widened=True)
        return f"x = {_in_order(fragments)}({turned})" if gathers else f"x = {turned}"

    flat = (tile[0] * tile[1] // size, size)
    if flip and flat == tile and not _in_threads(view, dtype, fragments):
        # One block: from the left, so that nothing is transposed. (Sylvester's matrix alone is symmetric.)
        return [product("x", matrix if rotation.signs is Signs.NONE else f"tl.trans({matrix})", left=True)]
    lines = ["x = tl.trans(x)"] if flip else []
    lines.append(product("x" if flat == tile else f"tl.reshape(x, {flat})", matrix))
    if flat != tile:
        lines.append(f"x = tl.reshape(x, {tile})")
    return [*lines, *(["x = tl.trans(x)"] if flip else [])]


def _gathers(view: View, axis: int, rotation: Rotation, dtype: torch.dtype, fragments: Fragments) -> bool:
    """True where the matrix has its columns in an order that leaves sixteen neighbours of a turned row in one thread.

    A warpgroup's product leaves pairs, eight columns apart, in each of four lanes. They would share a block: each would find
    its scale, and all of them exchange its amax and its sums. Smaller rotations stay as they are: several in one matrix
    would spread what is not finite from one to the other.
    """
    if not (fragments.interpreted or fragments.target.name == GATHERS):
        return False
    along = 1 - axis if view.output.transposed else axis
    from_right = along == 1 or view.tile[0] != rotation.block or _in_threads(view, dtype, fragments)
    return from_right and rotation.block >= 64 and view.block[along] in (16, 32)


GATHERS = "sm_90"  # where a product leaves a row in four lanes: a thread of Blackwell's has all of it


def _in_order(fragments: Fragments) -> str:
    """A function that gives columns their places back, which moves nothing: threads keep what they have."""
    return fragments.add(
        "in_order",
        '''
def in_order(x):
    """Columns of a product with a matrix that was spread, as they belong; they stay in their threads."""
    parts = tl.reshape(x, (x.shape[0], x.shape[1] // 64, 8, 4, 2))
    return tl.reshape(tl.permute(parts, (0, 1, 3, 2, 4)), x.shape)
''',
    )


def _in_threads(view: View, dtype: torch.dtype, fragments: Fragments) -> bool:
    """True where a thread should hold neighbours along the rows that are turned, because blocks lie along them: there
    products leave neighbours along their columns in a thread, and so come from the right, transposed."""
    return view.block[0] > 1 and dtype.itemsize == 2 and fragments.target.name in _BY_ROWS


_BY_ROWS = ("sm_90", "sm_100")  # a warpgroup's product leaves a row in few threads


def matrix_fragment(fragments: Fragments, gathers: bool = False) -> str:
    """A function (order, size) -> matrix of +-1 in FP32. gathers: with its columns in the order that `in_order` undoes."""
    about, place = "", ""
    if gathers:
        about = "\n\n    Four lanes of a warpgroup's product hold pairs of columns: here each holds sixteen neighbours.\n    "
        place = "\n    col = col // 64 * 64 + col // 2 % 4 * 16 + col // 8 % 8 * 2 + col % 2"
    return fragments.numbered(
        "hadamard",
        f'''
def hadamard(BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Sylvester's matrix of +-1 of order BLOCK.{about}"""
    row = tl.arange(0, SIZE)[:, None]
    col = tl.arange(0, SIZE)[None, :]{place}
    # The entry is -1 where row and column have an odd number of bits in common; bit i of 0x6996 is set for odd i.
    common = row & col & (BLOCK - 1)
    odd = 0x6996 >> ((common ^ (common >> 4)) & 15)
    entry = ((odd << 31) | 0x3F800000).to(tl.float32, bitcast=True)
    if BLOCK < SIZE:
        entry = tl.where(row // BLOCK == col // BLOCK, entry, 0.0)
    return entry
''',
    )


UPPER = '''
def upper(x):
    """The upper half of FP32 numbers as BF16: cut off after eight bits, which is cheaper than rounded."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
'''


def product_fragment(dtype: torch.dtype, fragments: Fragments, left: bool = False) -> str:
    """A function (x, matrix of small integers) -> their product in FP32, for an x of this dtype. left: the matrix comes
    first."""

    def dot(x: str, matrix: str, rest: str = "") -> str:
        return f"tl.dot({', '.join([matrix, x] if left else [x, matrix])}{rest})"

    if fragments.interpreted:
        body = "    return " + dot("x.to(tl.float32)", "matrix.to(tl.float32)", ', input_precision="ieee"')
    elif dtype == torch.float32:
        fragments.add("upper", UPPER)
        total = dot("high", "matrix", ", " + dot("middle", "matrix", ", " + dot("low", "matrix")))
        body = f"""    # Three BF16 numbers hold an FP32 one exactly.
    high = upper(x)
    rest = x - high.to(tl.float32)
    middle = upper(rest)
    low = upper(rest - middle.to(tl.float32))
    matrix = matrix.to(tl.bfloat16)
    return {total}"""
    else:
        body = f"    return {dot('x', 'matrix.to(x.dtype)')}"
    name = "times_left" if left else "times"
    text = f'''def {name}(x, matrix):
    """{"A matrix of +-1 times x" if left else "x times a matrix of +-1"}, summed in FP32."""
{body}'''
    return fragments.numbered(name, text)
