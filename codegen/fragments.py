"""The jit functions that generated kernels are made of: each is text, added once to a module that needs it."""

from __future__ import annotations

from lpcompile.codegen.source import POINTERS
from lpcompile.formats import E4M3, E5M2, Elem, Float, Int, Quant, Rounding, Rule, Special
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen.fragments", "import it as lpcompile.codegen, not as codegen"


class Fragments:
    """The fragments of one module, in the order in which they were first needed.

    wide: offsets into the matrices may pass 31 bits.
    """

    def __init__(self, target: Target, wide: bool) -> None:
        self.target, self.wide = target, wide
        self._texts: dict[str, str] = {}

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter truncates where a GPU rounds, so that there every rounding is written out."""
        return not self.target.name.startswith("sm_")

    @property
    def converts_fp8(self) -> bool:
        """True where the hardware rounds FP32 to FP8 (to nearest even, saturating)."""
        return not self.interpreted and int(self.target.name[3:]) >= 89

    def add(self, name: str, text: str) -> str:
        """Adds a fragment called `name` and returns that name."""
        self._texts.setdefault(name, text.strip("\n"))
        return name

    def text(self) -> str:
        return "\n\n\n".join(f"@triton.jit\n{text}" for text in self._texts.values())

    # ---- tiles in memory -----------------------------------------------------------------------------------------

    def _tile(self, name: str, verb: str, access: str, rows: bool, cols: bool, result: str = "") -> str:
        """A function that accesses a tile of a row-major matrix; rows, cols: which sizes have to be checked."""
        suffix = "_".join(["", *(["rows"] if rows else []), *(["cols"] if cols else [])])
        checks = [*(["(row0 + row < rows)"] if rows else []), *(["(col0 + col < cols)"] if cols else [])]
        mask = f", mask={' & '.join(checks)}" if checks else ""
        value = "HEIGHT: tl.constexpr, WIDTH: tl.constexpr" if result else "value"
        height, width = ("HEIGHT", "WIDTH") if result else ("value.shape[0]", "value.shape[1]")
        sizes = "rows, cols" if rows else "cols"
        offset = "tl.cast(row0, tl.int64)" if self.wide else "row0"
        return self.add(
            f"{name}{suffix}",
            f'''
def {name}{suffix}(matrix, {value}, row0, col0, {sizes}):
    """{verb} the tile at (row0, col0) of a row-major matrix with `cols` columns{" as far as it reaches" if checks else ""}."""
    row = tl.arange(0, {height})[:, None]
    col = tl.arange(0, {width})[None, :]
    matrix += {offset} * cols + col0
    {result}{access}{mask}{", other=0" if result and checks else ""})
''',
        )

    def load(self, rows: bool, cols: bool) -> str:
        return self._tile("load_tile", "Reads", "tl.load(matrix + row * cols + col", rows, cols, "return ")

    def store(self, rows: bool, cols: bool) -> str:
        return self._tile("store_tile", "Writes", "tl.store(matrix + row * cols + col, value", rows, cols)

    def raise_to(self, rows: bool, cols: bool) -> str:
        access = 'tl.atomic_max(matrix + row * cols + col, value, sem="relaxed"'
        return self._tile("raise_tile", "Raises to at least `value`", access, rows, cols)

    # ---- scales --------------------------------------------------------------------------------------------------

    def magnitude_bits(self) -> str:
        return self.add(
            "magnitude_bits",
            '''
def magnitude_bits(x):
    """The bits of |x| in FP32. They order as the numbers do, infinities and NaNs on top."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
''',
        )

    def _checked_scale(self) -> str:
        return self.add(
            "checked_scale",
            '''
def checked_scale(scale, peak_bits):
    """The scale, 1 where there are only zeros, NaN where something is not finite."""
    scale = tl.where(scale > 0, scale, 1.0)
    return tl.where(peak_bits < 0x7F800000, scale, float("nan"))
''',
        )

    def power_of_two(self, rule: Rule, shift: int = 0) -> str:
        """A function from positive FP32 numbers to powers of two, from the bits."""
        name, adjust = {
            Rule.UP: ("up", "exponent += ((bits & 0x7FFFFF) != 0).to(tl.int32)"),
            Rule.NEAREST: ("nearest", "exponent += ((bits & 0x7FFFFF) > 0x3504F3).to(tl.int32)"),
        }.get(Rule.NEAREST if rule is Rule.QUEST else rule, ("down", ""))
        lines = [
            f"def power_of_two_{name}(x):",
            f'    """2^(e - {shift}) for x = 2^e * 1.m with e rounded {name if name != "nearest" else "to nearest"}."""',
            "    bits = x.to(tl.int32, bitcast=True)",
            "    exponent = bits >> 23",
            *([f"    {adjust}"] if adjust else []),
            *([f"    exponent -= {shift}"] if shift else []),
            "    return (tl.minimum(tl.maximum(exponent, 1), 254) << 23).to(tl.float32, bitcast=True)",
        ]
        if not shift:
            lines[1] = lines[1].replace("(e - 0)", "e")
        return self.add(f"power_of_two_{name}", "\n".join(lines))

    def peak_scale(self, quant: Quant) -> str:
        """A function from the bits of amax to the block's scale, for one-level rules that know no more than amax."""
        self._checked_scale()
        if quant.rule in (Rule.FLOOR, Rule.MATCHED):
            assert isinstance(quant.elem, Float)
            value = f"{self.power_of_two(quant.rule, quant.elem.emax)}(peak)"
        else:
            value = f"tl.div_rn(peak, {quant.target!r})"
            value = f"{self.power_of_two(quant.rule)}({value})" if quant.pow2 else value
        zero = " * (peak > 0)" if quant.pow2 else ""
        text = f'''
def block_scale(peak_bits):
    """{_spell(quant)}: the scale of a block whose amax has these bits."""
    peak = peak_bits.to(tl.float32, bitcast=True)
    return checked_scale({value}{zero}, peak_bits)
'''
        return self._numbered("block_scale", text)

    def _numbered(self, name: str, text: str) -> str:
        """Adds a fragment under `name`, or with a number where a different one has it already."""
        text = text.strip("\n")
        for index in range(len(self._texts) + 1):
            candidate = f"{name}_{index}" if index else name
            renamed = text.replace(f"def {name}(", f"def {candidate}(", 1)
            if self._texts.get(candidate, renamed) == renamed:
                return self.add(candidate, renamed)
        raise AssertionError(name)

    def inverse_power_of_two(self) -> str:
        return self.add(
            "inverse_power_of_two",
            '''
def inverse_power_of_two(scale):
    """1 / scale, exactly: multiplying with it is dividing."""
    # The inverse of 2^127 is the one that is subnormal.
    bits = tl.maximum(0x7F000000 - scale.to(tl.int32, bitcast=True), 0x00400000)
    return bits.to(tl.float32, bitcast=True)
''',
        )

    def e8m0(self) -> str:
        return self.add(
            "e8m0",
            '''
def e8m0(scale):
    """The byte of a power of two, 255 for NaN."""
    return ((scale.to(tl.int32, bitcast=True) >> 23) & 0xFF).to(tl.uint8)
''',
        )

    # ---- codes ---------------------------------------------------------------------------------------------------

    def pack_nibbles(self) -> str:
        return self.add(
            "pack_nibbles",
            '''
def pack_nibbles(code):
    """Two codes a byte along the last axis, the even one in the low nibble."""
    low, high = tl.split(tl.reshape(code, (code.shape[0], code.shape[1] // 2, 2)))
    return ((low & 15) | (high << 4)).to(tl.uint8)
''',
        )

    def clamp(self) -> str:
        return self.add(
            "saturate",
            '''
def saturate(x, low: tl.constexpr, high: tl.constexpr):
    """x within [low, high]. Comparisons, because FP8 stores after a NaN-propagating min or max were miscompiled."""
    x = tl.where(x > high, high, x)
    return tl.where(x < low, low, x)
''',
        )

    def native(self, elem: Elem) -> bool:
        """True where a conversion instruction makes the codes: to nearest even, saturating."""
        return self.converts_fp8 and elem in (E4M3, E5M2)

    def encode(self, elem: Elem, rounding: Rounding) -> str:
        """A function from scaled values (and noise, where rounding is stochastic) to codes in the storage dtype."""
        if isinstance(elem, Int):
            return self._encode_int(elem, rounding)
        return self._encode_float(elem, rounding)

    def _encode_int(self, elem: Int, rounding: Rounding) -> str:
        storage = "int8" if elem.bits <= 8 else "int16"
        if rounding is Rounding.RTNE:
            self.clamp()
            text = f'''
def encode_{elem}(scaled):
    """{elem} codes, rounded to nearest even."""
    # Adding 1.5 * 2^23 leaves the rounded integer in the lowest bits.
    shifted = saturate(scaled, {elem.min!r}, {elem.max!r}) + 12582912.0
    return shifted.to(tl.int32, bitcast=True).to(tl.{storage})
'''
            return self.add(f"encode_{elem}", text)
        argument, _ = _units(rounding)
        self._whole_units(rounding)
        text = f'''
def encode_{elem}_{rounding}(scaled{argument}):
    """{elem} codes, {_ROUNDED[rounding]}."""
    units = whole_units(tl.minimum(tl.abs(scaled), {max(elem.max, -elem.min)!r}){argument})
    code = tl.where(scaled < 0, -units, units)
    return tl.minimum(tl.maximum(code, {int(elem.min)}), {int(elem.max)}).to(tl.{storage})
'''
        return self.add(f"encode_{elem}_{rounding}", text)

    def _whole_units(self, rounding: Rounding) -> str:
        argument, value = _units(rounding)
        return self._numbered(
            "whole_units",
            f'''
def whole_units(magnitude{argument}):
    """Non-negative FP32 numbers as integers, {_ROUNDED[rounding]}."""
    low = magnitude.to(tl.int32)
    return {value}
''',
        )

    def _encode_float(self, elem: Float, rounding: Rounding) -> str:
        """Codes by integer arithmetic: units of the binade's step, added to the code of the binade."""
        name = f"encode_{elem}" + ("" if rounding is Rounding.RTNE else f"_{rounding}")
        argument, _ = _units(rounding)
        low = elem.emin + 127
        if rounding is Rounding.RTNE:
            units = f"""
    # Adding 2^23 steps leaves the number of steps, rounded to nearest even, in the mantissa.
    magic = (exponent + {23 - elem.man}) << 23
    units = (magnitude.to(tl.float32, bitcast=True) + magic.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - magic
"""
        else:
            whole = self._whole_units(rounding)
            units = f"""
    per_step = (({254 + elem.man} - exponent) << 23).to(tl.float32, bitcast=True)
    units = {whole}(magnitude.to(tl.float32, bitcast=True) * per_step{argument})
"""
        sign = f"((bits >> {31 - elem.exp - elem.man}) & {1 << (elem.exp + elem.man)})"
        signed = f"tl.where(code == 0, 0, {sign})" if elem.special is Special.FNUZ else sign
        storage = "uint8" if elem.bits <= 8 else "int16"
        text = f'''
def {name}(scaled{argument}):
    """{elem} codes, {_ROUNDED[rounding]}, saturating."""
    bits = scaled.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, {_bits(elem.max)})
    exponent = tl.maximum(magnitude >> 23, {low})
{units.strip(chr(10))}
    code = ((exponent - {low}) << {elem.man}) + units
    return (code | {signed}).to(tl.{storage})
'''
        return self.add(name, text)


_ROUNDED = {
    Rounding.RTNE: "rounded to nearest even",
    Rounding.TRUNC: "rounded toward zero",
    Rounding.SR: "rounded stochastically",
    Rounding.SR8: "rounded stochastically",
}


def _units(rounding: Rounding) -> tuple[str, str]:
    """(further argument, how a magnitude becomes an integer)."""
    if not rounding.stochastic:
        return "", "low"
    # Only the fraction meets the noise: a sum with the whole number would be rounded.
    return ", noise", "low + (magnitude - low.to(tl.float32) + noise >= 1.0).to(tl.int32)"


def _bits(value: float) -> str:
    """The FP32 bits of a number, as text."""
    import struct

    return f"0x{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def _spell(quant: Quant) -> str:
    """What a scale depends on, for a docstring."""
    return f"{quant.rule} for {quant.elem}" + (f", clip {quant.clip!r}" if quant.clip != 1.0 else "")


def pointer(dtype: object) -> str:
    """The Triton type of a pointer to a torch dtype."""
    return POINTERS[dtype]  # type: ignore[index]
