"""How a tile's block scales are found and what they make of its values: one function for each family of scale rules.

Each adds lines that define `scale` (FP32, one a block, as it is stored), and either `scaled` (what is rounded to codes) or
`grid` (rounded already); they return the condition under which codes are valid, as text.
"""

from __future__ import annotations

import torch

from lpcompile.codegen.fragments import Fragments
from lpcompile.codegen.function import Function
from lpcompile.codegen.magnitudes import bits, magnitudes
from lpcompile.codegen.noise import stream_key, uniform
from lpcompile.codegen.views import Blocks, View, origin
from lpcompile.errors import KernelError
from lpcompile.exact import magic, step_of
from lpcompile.formats import E2M1, E4M3, EDEN_CLIP, EDEN_GROUP, Rounding, Rule

assert __name__ == "lpcompile.codegen.rules", "import it as lpcompile.codegen, not as codegen"

_FLT_MAX = "3.4028234663852886e+38"


def add_scale(view: View, dtype: torch.dtype, fragments: Fragments, function: Function) -> str:
    """Adds the lines of a view's rule. `x`: the tile, as `add_tile` leaves it; `noise` where rounding is stochastic."""
    quant = view.quant
    _add_peaks(view, fragments, function)
    if quant.rule is Rule.EDEN:
        return _eden(view, dtype, fragments, function)
    if quant.outer is not None:
        return _two_level(view, fragments, function)
    return _one_level(view, dtype, fragments, function)


def add_tile(view: View, dtype: torch.dtype, fragments: Fragments, function: Function, computed: bool) -> None:
    """`x` in FP32, its blocks apart, and `peak_bits`, one a block, unless tiles share them.

    computed: the kernel computes or turns tiles. Peaks of numbers of 16 bits are found before these are widened, so that they
    stay together in registers; on an H200 only long blocks of what is computed are faster (by 4 to 8 %) the other way around.
    """
    apart = view.blocks.apart("x")
    late = not _shares_peaks(view) and not (computed and max(view.block) >= 128 and min(view.block) == 1)
    if not late:
        function.add(f"x = {apart}.to(tl.float32)")
    elif apart != "x":
        function.add(f"x = {apart}")
    if not _shares_peaks(view):
        compared = dtype if late else torch.float32
        found = view.blocks.reduced(f"{magnitudes(compared, fragments)}(x)")
        function.add(f"peak_bits = {bits(found, compared)}")
    if late:
        function.add("x = x.to(tl.float32)")


def _shares_peaks(view: View) -> bool:
    """True where the amax of its blocks were found by other tiles too, and are read."""
    return view.peak_block is not None and view.quant.outer is None and view.output.carrier is None


def _add_peaks(view: View, fragments: Fragments, function: Function) -> None:
    """`peak_bits` that tiles share; `tensor_bits` of a scale above those of blocks."""
    blocks, quant = view.blocks, view.quant
    if quant.outer is not None:
        # Loaded by the kernel, before any output is stored: what two outputs have in common is computed once then.
        function.add(f"tensor_bits = tl.full({(1,) * len(blocks.shape)}, {function.take('tensor_bits')}, tl.int32)")
    elif view.peak_block is not None and _shares_peaks(view):
        loaded = load_peaks(view, view.peak_block, fragments, function)
        function.add(f"peak_bits = {blocks.beside(loaded) if len(blocks.shape) != 2 else loaded}")


def load_peaks(view: View, block: tuple[int, int], fragments: Fragments, function: Function) -> str:
    """The bits of amax that tiles share, as a matrix of the tile's."""
    counts = Blocks.of(view.tile, block).counts
    row, col = origin(block)
    rows, cols = view.checks(block)
    extents = [extent.blocks(length).text for extent, length in zip(view.extents, block, strict=True)]
    sizes = ", ".join(extents if rows else extents[1:])
    return f"{fragments.load(rows, cols)}({function.take('peaks')}, {counts[0]}, {counts[1]}, {row}, {col}, {sizes})"


# ---- one level ---------------------------------------------------------------------------------------------------


def _one_level(view: View, dtype: torch.dtype, fragments: Fragments, function: Function) -> str:
    quant = view.quant
    if quant.masked:
        _quest(view, fragments, function)
    else:
        function.add(f"scale = {fragments.peak_scale(quant, dtype)}(peak_bits)")
    # The reference multiplies first: the product may round.
    values = f"x * {quant.constant!r}" if quant.constant != 1.0 else "x"
    if quant.pow2:
        function.add(f"scaled = {values} * {fragments.inverse_power_of_two()}(scale)")
    else:
        function.add(f"scaled = {fragments.divide()}({values}, scale)")
    return "scale == scale"


def _quest(view: View, fragments: Fragments, function: Function) -> None:
    quant, blocks = view.quant, view.blocks
    if 0 in view.block:
        raise KernelError(f"{view.output}: {quant.rule} of blocks that span an axis is not generated")
    paper = quant.rule is Rule.QUEST_PAPER
    count = view.block[0] * view.block[1]
    fragments.checked_scale()
    assert quant.quest_clip is not None
    function.add(
        "# Squares of values near 1 neither overflow nor vanish.",
        "unit = tl.maximum(peak_bits & 0x7F800000, 0x00800000).to(tl.float32, bitcast=True)",
        f"near_one = x * {fragments.inverse_power_of_two()}(unit)",
        f"power = {blocks.reduced('near_one * near_one', 'tl.sum')} * {1 / count!r}",
    )
    if paper:
        mean = blocks.reduced("near_one", "tl.sum")
        function.add(f"mean = {mean} * {1 / count!r}", "power = power - mean * mean")
        function.add("power = tl.where(power < 0, 0.0, power)")
    wanted = f"tl.sqrt_rn(power) * {quant.quest_clip / quant.target!r} * unit{' + 1e-08' if paper else ''}"
    power_of_two = fragments.power_of_two(quant.rule)
    function.add(f"scale = {power_of_two}({wanted}) * (peak_bits > 0)", "scale = checked_scale(scale, peak_bits)")


# ---- two levels --------------------------------------------------------------------------------------------------


def _tensor_encode(fragments: Fragments) -> str:
    return fragments.add(
        "tensor_encode",
        f'''
def tensor_encode(peak_bits, TOP: tl.constexpr):
    """The factor that maps a tensor's amax to TOP, 1 where there is none."""
    peak = peak_bits.to(tl.float32, bitcast=True)
    encode = tl.div_rn(tl.full(peak.shape, TOP, tl.float32), peak)
    encode = tl.where(encode > {_FLT_MAX}, {_FLT_MAX}, encode)
    return tl.where((peak > 0) & (encode > 0), encode, 1.0)
''',
    )


def _reciprocal(fragments: Fragments) -> str:
    return fragments.add(
        "reciprocal",
        '''
def reciprocal(x):
    """1 / x, correctly rounded."""
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)
''',
    )


def _two_level_scale(fragments: Fragments) -> str:
    grid = fragments.grid(E4M3, Rounding.RTNE, nan=True)
    _reciprocal(fragments)
    return fragments.add(
        "two_level_scale",
        f'''
def two_level_scale(peak_bits, encode, TOP: tl.constexpr, PER_TOP: tl.constexpr):
    """(block scale, factor of the values): amax goes to TOP; the order of operations is TransformerEngine's."""
    raw = peak_bits.to(tl.float32, bitcast=True) * (encode * PER_TOP)
    scale = {grid}(tl.where(raw > 448.0, 448.0, raw))
    return scale, {fragments.bounded_reciprocal()}(scale * reciprocal(encode))
''',
    )


def _two_level(view: View, fragments: Fragments, function: Function) -> str:
    quant = view.quant
    four_six = quant.rule is Rule.FOUR_SIX
    top = (256.0 if four_six else quant.scale.max) * quant.target
    _reciprocal(fragments)
    scale = _two_level_scale(fragments)
    function.add(
        f"encode = {_tensor_encode(fragments)}(tensor_bits, {top!r})",
        'outer = tl.where(tensor_bits < 0x7F800000, reciprocal(encode), float("nan"))',
        f"scale, inverse = {scale}(peak_bits, encode, {quant.target!r}, {1 / quant.target!r})",
    )
    if not four_six:
        function.add("scaled = x * inverse")
        return "outer == outer"
    noise = ", noise" if quant.rounding.stochastic else ""
    grid = fragments.grid(quant.elem, quant.rounding)
    target = quant.target * (4.0 / 6.0)
    if 0 in view.block:
        raise KernelError(f"{view.output}: {quant.rule} of blocks that span an axis is not generated")
    length = view.block[0] * view.block[1]
    error = _squared_error(fragments, step_of(quant, length))
    errors = [view.blocks.reduced(f"{error}({g} - x * {inverse})", "tl.sum") for g, inverse in _CANDIDATES]
    function.add(
        f"grid = {grid}(x * inverse{noise})",
        f"scale_4, inverse_4 = {scale}(peak_bits, encode, {target!r}, {1 / target!r})",
        f"grid_4 = {grid}(x * inverse_4{noise})",
        f"error = {errors[0]} * scale * scale",
        f"error_4 = {errors[1]} * scale_4 * scale_4",
        "# A block that vanishes under the smaller scale may live under the larger.",
        "four = (error_4 < error) | (scale == 0)",
        "scale = tl.where(four, scale_4, scale)",
        "grid = tl.where(four, grid_4, grid)",
    )
    return "outer == outer"


_CANDIDATES = (("grid", "inverse"), ("grid_4", "inverse_4"))


def _squared_error(fragments: Fragments, step: float) -> str:
    return fragments.add(
        "squared_error",
        f'''
def squared_error(distance):
    """In steps of {step!r}, of which FP32 adds as many as a block has exactly, in any order."""
    distance = (distance + {magic(step)!r}) - {magic(step)!r}
    return distance * distance
''',
    )


# ---- MS-EDEN -----------------------------------------------------------------------------------------------------


def _eden(view: View, dtype: torch.dtype, fragments: Fragments, function: Function) -> str:
    quant, blocks = view.quant, view.blocks
    reach = quant.target / EDEN_CLIP
    round_scale = fragments.grid(E4M3, Rounding.RTNE, nan=True)
    step = step_of(quant, view.block[0] * view.block[1])
    function.add(
        "peak = tensor_bits.to(tl.float32, bitcast=True)",
        f"outer = {fragments.over(256.0 * reach, dtype)}",
        'outer = tl.where(tensor_bits < 0x7F800000, tl.where(outer > 0, outer, 1.0), float("nan"))',
        f"scale = {round_scale}({fragments.divide()}(peak_bits.to(tl.float32, bitcast=True), outer * {reach!r}))",
        "scale = tl.where(scale == 0, 1.0, scale)",
        f"scaled = x * {fragments.bounded_reciprocal()}(scale * outer)",
        f"grid = {fragments.grid(E2M1, Rounding.RTNE)}(scaled)",
        f"# In steps of which FP32 adds as many as a block has exactly, in any order; integers add those of {EDEN_GROUP}.",
        f"steps = (scaled + {magic(step)!r}) - {magic(step)!r}",
    )
    along = 1 if view.axis == 1 else 0
    group = EDEN_GROUP // view.block[along]
    counts = blocks.counts
    if counts[along] % group:
        raise KernelError(f"{view.output}: {EDEN_GROUP} elements of a row are corrected together, tiles have fewer")
    for name, value, unit in (("power", "steps * steps", step * step), ("product", "steps * grid", step / 2)):
        summed = blocks.as_matrix(blocks.reduced(value, "tl.sum"))
        function.add(f"{name} = ({summed} * {1 / unit!r}).to(tl.int32)")
        function.add(f"{name} = {_group_sum(fragments, along)}({name}, {group}).to(tl.float32) * {unit!r}")
    row, col = origin(view.block)
    transposed = view.output.transposed
    shape = counts[::-1] if transposed else counts
    place = (col, row) if transposed else (row, col)
    extent = view.scale_extents[0 if transposed else 1]
    noise = uniform(fragments, False, extent)
    where = f"{place[0]}, {place[1]}, {extent.text}, {shape[0]}, {shape[1]}"
    drawn = f"{_settled(fragments)}({noise}({add_key(view, fragments, function)}, {where}))"
    function.add(
        f"correction = tl.where(product > 0, {fragments.divide()}(power, product), 1.0)",
        f"corrected = {blocks.as_matrix('scale')} * correction",
        "corrected = tl.where(corrected > 448.0, 448.0, corrected)",
        f"noise = {f'tl.trans({drawn})' if transposed else drawn}",
        f"scale = {blocks.beside(f'{fragments.grid(E4M3, Rounding.SR, nan=True)}(corrected, noise)')}",
    )
    return "outer == outer"


def _settled(fragments: Fragments) -> str:
    """A function that lets numbers be handed to the threads that need them, where a compiler would have each thread draw
    again, four numbers for each that it takes."""
    return fragments.add(
        "settled",
        '''
def settled(x):
    """x, which is made in one place: no layout is carried back across a reduction, here of two that are equal."""
    return tl.max(tl.join(x, x), axis=2)
''',
    )


def _group_sum(fragments: Fragments, along: int) -> str:
    if along == 1:
        shape, axis = "(values.shape[0], values.shape[1] // COUNT, COUNT)", 2
    else:
        shape, axis = "(values.shape[0] // COUNT, COUNT, values.shape[1])", 1
    return fragments.numbered(
        "group_sum",
        f'''
def group_sum(values, COUNT: tl.constexpr):
    """The sum of each COUNT neighbours {"in a row" if along == 1 else "in a column"}, in every one of them."""
    groups = tl.reshape(values, {shape})
    total = tl.sum(groups, axis={axis}, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, groups.shape), values.shape)
''',
    )


def add_key(view: View, fragments: Fragments, function: Function) -> str:
    """The key of the stream that rounds this output."""
    function.take("seed", "use")
    function.add(f"key = {stream_key(fragments)}(seed, 2 * use)")
    return "key"
