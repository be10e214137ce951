"""The function that quantises a tile and writes it: one for each output of a Cast."""

from __future__ import annotations

from dataclasses import dataclass, field

from lpcompile.codegen.extents import Extent
from lpcompile.codegen.fragments import Fragments
from lpcompile.codegen.views import View
from lpcompile.errors import KernelError
from lpcompile.formats import E8M0, F32, Rounding

assert __name__ == "lpcompile.codegen.write", "import it as lpcompile.codegen, not as codegen"


@dataclass
class Function:
    """A jit function being written. arguments: what callers pass after the tile and its place."""

    name: str
    doc: str
    arguments: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def take(self, argument: str) -> str:
        """Declares an argument."""
        if argument not in self.arguments:
            self.arguments.append(argument)
        return argument


def emit_write(view: View, fragments: Fragments, sizes: tuple[str, ...]) -> Function:
    """Writes `write_<index>(x, row0, col0, <parts...>, <amax>, <sizes>)`; sizes: names of sizes that are arguments."""
    function = Function(f"write_{view.index}", f"{view.output} of a tile, which lies at (row0, col0) of what is written.")
    add = function.lines.append
    shape = view.blocked[0]
    if shape != view.tile:
        add(f"x = tl.reshape(x, {shape})")
    add("x = x.to(tl.float32)")
    _scale(view, fragments, function)
    _scaled(view, fragments, function)
    if view.output.decoded:
        raise KernelError(f"{view.output}: not generated")
    code = f"{_encoder(view, fragments)}(scaled)"
    if fragments.native(view.quant.elem):
        code = f"scaled.to(tl.{'float8e4nv' if view.quant.elem.man == 3 else 'float8e5'})"
    add(f"code = {_reshaped(code, shape, view.tile)}")
    _store_codes(view, fragments, function)
    _store_scale(view, fragments, function)
    function.arguments += sizes
    return function


def _reshaped(value: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return value if shape == wanted else f"tl.reshape({value}, {wanted})"


def reduced(value: str, shape: tuple[int, ...], scale_shape: tuple[int, ...], op: str = "tl.max") -> str:
    """`value` reduced over the axes along which blocks lie, keeping them."""
    for axis in reversed(range(len(shape))):
        if scale_shape[axis] == 1 and shape[axis] > 1:
            value = f"{op}({value}, axis={axis}, keep_dims=True)"
    return value


def _scale(view: View, fragments: Fragments, function: Function) -> None:
    """`scale`: FP32, in the shape of `View.blocked`."""
    shape, scale_shape = view.blocked
    bits = fragments.magnitude_bits()
    if view.whole:
        peaks, tile = function.take("peaks"), view.scale_tile
        load = tile_access(fragments.load, view.scale_extents, tile, view)
        row, col = scale_origin(view)
        loaded = load.format(f"{peaks}, {tile[0]}, {tile[1]}, {row}, {col}")
        function.lines.append(f"peak = {_reshaped(loaded, tile, scale_shape)}")
    else:
        function.lines.append(f"peak = {reduced(f'{bits}(x)', shape, scale_shape)}")
    function.lines.append(f"factor = {fragments.peak_scale(view.quant)}(peak)")


def _scaled(view: View, fragments: Fragments, function: Function) -> None:
    """`scaled`: what is rounded to codes, 0 in blocks that are not finite."""
    quant = view.quant
    values = f"x * {quant.constant!r}" if quant.constant != 1.0 else "x"
    if quant.pow2:
        function.lines.append(f"scaled = {values} * {fragments.inverse_power_of_two()}(factor)")
    else:
        function.lines.append(f"scaled = tl.div_rn({values}, factor)")
    function.lines.append("scaled = tl.where(factor == factor, scaled, 0.0)")


def _encoder(view: View, fragments: Fragments) -> str:
    quant = view.quant
    if quant.rounding.stochastic:
        raise KernelError(f"{view.output}: not generated")
    return fragments.encode(quant.elem, Rounding.RTNE if quant.elem == F32 else quant.rounding)


def _store_codes(view: View, fragments: Fragments, function: Function) -> None:
    rows, cols = view.extents
    name, tile = "codes", view.tile
    checks = [not view.unchecked(0), not view.unchecked(1)]
    col = "col0"
    if view.quant.packed:
        function.lines.append(f"code = {fragments.pack_nibbles()}(code)")
        cols, tile, col = cols.blocks(2), (tile[0], tile[1] // 2), "col0 // 2"
    store = tile_access(fragments.store, (rows, cols), tile, view, checks)
    function.lines.append(store.format(f"{function.take(name)}, code, row0, {col}"))


def scale_origin(view: View) -> tuple[str, str]:
    """Where the scales of the tile at (row0, col0) stand."""
    row, col = (
        "0" if block == 0 else name if block == 1 else f"{name} // {block}"
        for name, block in zip(("row0", "col0"), view.block, strict=True)
    )
    return row, col


def _store_scale(view: View, fragments: Fragments, function: Function) -> None:
    quant, tile = view.quant, view.scale_tile
    value = _reshaped("factor", view.blocked[1], tile)
    if quant.scale == E8M0:
        value = f"{fragments.e8m0()}({value})"
    row, col = scale_origin(view)
    store = tile_access(fragments.store, view.scale_extents, tile, view).format(
        f"{function.take('scale')}, {value}, {row}, {col}"
    )
    first = [f"{name} == 0" for name, block in zip(("row0", "col0"), view.block, strict=True) if block == 0]
    if first:
        function.lines.append(f"if {' and '.join(first)}:" if len(first) == 1 else f"if ({first[0]}) & ({first[1]}):")
        store = f"    {store}"
    function.lines.append(store)


def tile_access(
    kind: object, extents: tuple[Extent, Extent], tile: tuple[int, int], view: View, checks: list[bool] | None = None
) -> str:
    """A call of a load or store of a tile of a matrix with these sizes, with `{}` for all but the sizes."""
    if checks is None:
        checks = [block != 0 and not view.unchecked(axis) for axis, block in enumerate(view.block)]
    name = kind(*checks)  # type: ignore[operator]
    rows = f", {extents[0].text}" if checks[0] else ""
    return f"{name}({{}}{rows}, {extents[1].text})"
