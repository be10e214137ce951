"""The function that quantises a tile and writes it: one for each output of a Cast."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lpcompile.codegen.extents import Extent
from lpcompile.codegen.fragments import Fragments
from lpcompile.codegen.function import Function
from lpcompile.codegen.noise import uniform
from lpcompile.codegen.rules import add_key, add_scale, add_tile, load_peaks
from lpcompile.codegen.views import View, origin
from lpcompile.formats import E4M3, E8M0, F32, Int, Quant, Rounding, Rule
from lpcompile.recipe import folds

assert __name__ == "lpcompile.codegen.write", "import it as lpcompile.codegen, not as codegen"


# How kernels and launchers call the tensors that hold a part.
POINTERS_TO = {"codes": "codes", "values": "values", "scale": "scales", "outer": "outers", "mask": "masks"}


def emit_write(view: View, dtype: torch.dtype, fragments: Fragments, twin: bool = False, computed: bool = False) -> Function:
    """`write_<index>(x, row0, col0, <parts>, <peaks>, <seed and use>)` of a tile of `dtype` that is turned already. twin: the
    values of the same codes are written too, so that a compiler may do once what leads to both. computed: the kernel computes
    or turns tiles, and does not only read them."""
    doc = f"{view.output} of a tile, which lies at (row0, col0) of what is written."
    function = Function(f"write_{view.index}", doc, ("x", "row0", "col0"))
    quant = view.quant
    function.take(*(POINTERS_TO[part] for part in view.output.parts))
    add_tile(view, dtype, fragments, function, computed)
    # FP32 codes are the values themselves, however they would be rounded.
    rounding = Rounding.RTNE if quant.elem == F32 else quant.rounding
    if rounding.stochastic:
        _noise(view, fragments, function)
    noise = ", noise" if rounding.stochastic else ""
    name = "value" if view.output.decoded else "code"
    made = fragments.grid(quant.elem, rounding) if view.output.decoded else _encoded(quant, rounding, dtype, fragments)
    _add_rounded(view, dtype, fragments, function, name, lambda scaled: f"{made}({scaled}{noise})", twin)
    if view.output.carrier is not None:
        _carry(view.output.carrier, view, dtype, fragments, function)
    elif view.output.decoded:
        _store_values(view, fragments, function)
    else:
        _store_codes(view, fragments, function)
    if "scale" in view.output.parts and view.output.carrier is None:
        _store_scale(view, fragments, function)
    if "outer" in view.output.parts:
        _store_outer(view, fragments, function)
    if "mask" in view.output.parts:
        _store_mask(view, fragments, function)
    return function


def _encoded(quant: Quant, rounding: Rounding, dtype: torch.dtype, fragments: Fragments) -> str:
    """The function that makes codes.

    x / scale rounds to no integer beyond the largest code m where the scale is amax / m in FP32 and x has 16 bits: amax is at
    least 2^-133 then, the scale has 10 bits even among subnormal numbers, and |x| / scale <= m + m / 1032 < m + 1/2.
    """
    exact = quant.rule is Rule.ABSMAX and quant.scale == F32 and quant.outer is None and dtype.itemsize == 2
    within = exact and isinstance(quant.elem, Int) and not quant.elem.full and quant.elem.bits <= 8
    return fragments.encode(quant.elem, rounding, within)


def _add_rounded(
    view: View,
    dtype: torch.dtype,
    fragments: Fragments,
    function: Function,
    name: str,
    rounded: Callable[[str], str],
    twin: bool,
) -> None:
    """Adds `scale`, `name`, which is what is rounded, and the mask."""
    quant = view.quant
    valid = add_scale(view, dtype, fragments, function)
    if "mask" in view.output.parts:
        function.add(f"kept = (tl.abs(scaled) < {quant.target!r}) & ({valid})")
    on_grid = quant.rule in (Rule.FOUR_SIX, Rule.EDEN)
    before = "grid" if on_grid else "scaled"
    late = twin and quant.packed and not on_grid
    comment = "# A block that is not finite has codes 0; its scale says so."
    # What is multiplied with a scale that is NaN needs no care; one level has such, and so has MS-EDEN.
    spoilt = view.output.decoded and folds(quant) and (quant.pow2 or quant.rule is Rule.EDEN)
    if not late and not spoilt:
        function.add(comment, f"{before} = tl.where({valid}, {before}, 0.0)")
    if not on_grid:
        function.add(f"{name} = {rounded('scaled')}")
    else:
        function.add(f"{name} = {'grid' if view.output.decoded else f'{fragments.encode(quant.elem, Rounding.RTNE)}(grid)'}")
    if late:
        function.add(comment, f"{name} = tl.where({valid}, {name}, 0)")


def _noise(view: View, fragments: Fragments, function: Function) -> None:
    """`noise`: one number an element, by its place in the matrix that is not transposed."""
    transposed = view.output.transposed
    cols = view.extents[0 if transposed else 1]
    height, width = view.tile[::-1] if transposed else view.tile
    place = "col0, row0" if transposed else "row0, col0"
    draw = uniform(fragments, view.quant.rounding is Rounding.SR8, cols)
    drawn = f"{draw}({add_key(view, fragments, function)}, {place}, {cols.text}, {height}, {width})"
    function.add(f"noise = {view.blocks.apart(f'tl.trans({drawn})' if transposed else drawn)}")


def _store(view: View, fragments: Fragments, what: str, extents: tuple[Extent, Extent], block: tuple[int, int] = (1, 1)) -> str:
    """A call that stores `what` = "pointer, value, row, col" in a matrix of these sizes, one number a block."""
    rows, cols = view.checks(block)
    sizes = f"{extents[0].text}, {extents[1].text}" if rows else extents[1].text
    return f"{fragments.store(rows, cols)}({what}, {sizes})"


def _store_codes(view: View, fragments: Fragments, function: Function) -> None:
    rows, cols = view.extents
    if (code := view.blocks.together("code")) != "code":
        function.add(f"code = {code}")
    if view.quant.packed:
        packed = f"codes, {fragments.pack_nibbles()}(code), row0, col0 // 2"
        function.add(_store(view, fragments, packed, (rows, cols.blocks(2)), (1, 2)))
    else:
        function.add(_store(view, fragments, "codes, code, row0, col0", view.extents))


def _store_values(view: View, fragments: Fragments, function: Function) -> None:
    value = "value * scale" if folds(view.quant) else "value"
    values = fragments.rounded(f"({value})", torch.bfloat16)
    function.add(_store(view, fragments, f"values, {view.blocks.together(values)}, row0, col0", view.extents))


def _carry(carrier: Quant, view: View, dtype: torch.dtype, fragments: Fragments, function: Function) -> None:
    """Adds what stores values as codes of the carrier, and its scales, which the peaks of the matrix as it is read give."""
    block = view.scale_block
    function.add(
        f"carriers = {fragments.peak_scale(carrier, dtype)}({load_peaks(view, block, fragments, function)})",
        f"carrier = {view.blocks.spread('carriers', block)}",
        f"carried = value * (scale * {fragments.inverse_power_of_two()}(carrier))",
        "carried = tl.where(carrier == carrier, carried, 0.0)",
        f"carried = {view.blocks.together(f'{fragments.encode(carrier.elem, carrier.rounding)}(carried)')}",
        _store(view, fragments, "codes, carried, row0, col0", view.extents),
    )
    factor = f" * {1 / view.quant.constant!r}" if view.quant.has_outer else ""
    row, col = origin(block)
    store = _store(view, fragments, f"scales, carriers{factor}, {row}, {col}", view.scale_extents, block)
    function.add(*_once(store, block))


def _store_scale(view: View, fragments: Fragments, function: Function) -> None:
    quant = view.quant
    value = view.blocks.as_matrix("scale")
    if quant.scale == E8M0:
        value = f"{fragments.e8m0()}({value})"
    elif quant.scale == E4M3:
        value = f"{_encode_e4m3_scale(fragments)}({value})"
    row, col = origin(view.block)
    if view.output.tiled:
        function.add(_store_tiled(view, value, fragments))
        return
    store = _store(view, fragments, f"scales, {value}, {row}, {col}", view.scale_extents, view.block)
    function.add(*([store] if view.peak_block is None else _once(store, view.block)))


def _once(store: str, block: tuple[int, int]) -> list[str]:
    """Done by the first of the tiles that share a block."""
    first = [f"({name} == 0)" for name, length in zip(("row0", "col0"), block, strict=True) if not length]
    return [f"if {' & '.join(first)}:", f"    {store}"] if first else [store]


def _encode_e4m3_scale(fragments: Fragments) -> str:
    code = fragments.encode(E4M3, Rounding.RTNE)
    value = f"{code}(scale)"
    if not fragments.native(E4M3):
        value = f"tl.where(scale == scale, {value}, 127).to(tl.uint8)"
    return fragments.add(
        "encode_scale",
        f'''
def encode_scale(scale):
    """Block scales that lie on e4m3's grid as its codes, NaN as its NaN."""
    return {value}
''',
    )


def _store_tiled(view: View, value: str, fragments: Fragments) -> str:
    rows, cols = view.scale_extents
    masks = view.checks(view.block)
    conditions = [
        *(["(row < rows)"] if masks[0] else []),
        *(["(col < cols)"] if masks[1] else []),
    ]
    mask = f", mask={' & '.join(conditions)}" if conditions else ""
    name = fragments.numbered(
        "store_tiled",
        f'''
def store_tiled(scales, value, row0, col0, rows, cols):
    """Writes block scales in the 128 x 4 tiles that tensor cores read: 32 rows of 16 bytes each."""
    row = row0 + tl.arange(0, value.shape[0])[:, None]
    col = col0 + tl.arange(0, value.shape[1])[None, :]
    tile = row // 128 * ((cols + 3) // 4) + col // 4
    place = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + col % 4
    tl.store(scales + place, value{mask})
''',
    )
    row, col = origin(view.block)
    return f"{name}(scales, {value}, {row}, {col}, {rows.text}, {cols.text})"


def _store_outer(view: View, fragments: Fragments, function: Function) -> None:
    if view.quant.outer is not None:
        value = "tl.reshape(outer, (1, 1))"
    else:
        value = f"tl.full((1, 1), {1 / view.quant.constant!r}, tl.float32)"
    store = f"{fragments.store(False, False)}(outers, {value}, 0, 0, 1)"
    function.add(*_once(store, (0, 0)))


def _store_mask(view: View, fragments: Fragments, function: Function) -> None:
    rows, cols = view.extents
    # Where the reference packs whole blocks, bits beyond the matrix are those of the blocks' padding; elsewhere they are 0.
    in_blocks = not view.output.transposed and view.block[1] % 8 == 0 and view.block[1] > 0
    if not in_blocks and not cols.divides(8):
        function.add(f"kept = {view.blocks.together('kept')} & (col0 + tl.arange(0, {view.tile[1]})[None, :] < {cols.text})")
    else:
        function.add(f"kept = {view.blocks.together('kept')}")
    name = fragments.add(
        "pack_bits",
        '''
def pack_bits(kept):
    """Eight bits a byte along the last axis, the first in the lowest."""
    bits = tl.reshape(kept.to(tl.int32), (kept.shape[0], kept.shape[1] // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)
''',
    )
    packed = f"masks, {name}(kept), row0, col0 // 8"
    function.add(_store(view, fragments, packed, (rows, cols.blocks(8)), (1, 8)))
