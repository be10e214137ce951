"""The jit functions that generated kernels are made of: each is text, added once to a module that needs it."""

from __future__ import annotations

import torch

from lpcompile.codegen import arithmetic, dither
from lpcompile.codegen.source import POINTERS
from lpcompile.errors import KernelError
from lpcompile.formats import BF16, E4M3, E5M2, E8M0, F16, F32, Elem, Float, Int, Quant, Rounding, Rule, Special
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

    def _tile(self, name: str, verb: str, access: str, rows: bool, cols: bool, result: str = "", shape: str = "") -> str:
        """A function that accesses a tile of a row-major matrix; rows, cols: which sizes have to be checked; shape: what
        follows where rows come by eights."""
        suffix = "_".join(["", *(["rows"] if rows else []), *(["cols"] if cols else [])])
        checks = [*(["(row0 + row < rows)"] if rows else []), *(["(col0 + col < cols)"] if cols else [])]
        mask = f", mask={' & '.join(checks)}" if checks else ""
        value = "HEIGHT: tl.constexpr, WIDTH: tl.constexpr" if result else "value"
        height, width = ("HEIGHT", "WIDTH") if result else ("value.shape[0]", "value.shape[1]")
        row = f"tl.arange(0, {height})[:, None]"
        if shape:
            row = f"tl.arange(0, {height} // 8)[:, None, None] * 8 + tl.arange(0, 8)[None, :, None]"
        sizes = "rows, cols" if rows else "cols"
        offset = "tl.cast(row0, tl.int64)" if self.wide else "row0"
        return self.add(
            f"{name}{suffix}",
            f'''
def {name}{suffix}(matrix, {value}, row0, col0, {sizes}):
    """{verb} the tile at (row0, col0) of a row-major matrix with `cols` columns{" as far as it reaches" if checks else ""}."""
    row = {row}
    col = tl.arange(0, {width})[None, {"None, " if shape else ""}:]
    matrix += {offset} * cols + col0
    {result}{access}{mask}{", other=0.0" if result and checks else ""}){shape}
''',
        )

    def load(self, rows: bool, cols: bool) -> str:
        return self._tile("load_tile", "Reads", "tl.load(matrix + row * cols + col", rows, cols, "return ")

    def load_eights(self, rows: bool, cols: bool) -> str:
        """`load`, eight rows in a thread: what is reduced along rows, or written transposed, stays there longer."""
        return self._tile(
            "load_eights", "Reads", "tl.load(matrix + row * cols + col", rows, cols, "return tl.reshape(", ", (HEIGHT, WIDTH))"
        )

    def store(self, rows: bool, cols: bool) -> str:
        return self._tile("store_tile", "Writes", "tl.store(matrix + row * cols + col, value", rows, cols)

    def raise_to(self, rows: bool, cols: bool) -> str:
        access = 'tl.atomic_max(matrix + row * cols + col, value, sem="relaxed"'
        return self._tile("raise_tile", "Raises to at least `value`", access, rows, cols)

    # ---- scales --------------------------------------------------------------------------------------------------

    def checked_scale(self) -> str:
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
        return self.numbered(f"power_of_two_{name}", "\n".join(lines))

    def peak_scale(self, quant: Quant, dtype: torch.dtype) -> str:
        """A function from the bits of amax, a number of the dtype, to the block's scale, for one-level rules that know no
        more than amax."""
        self.checked_scale()
        if quant.rule in (Rule.FLOOR, Rule.MATCHED):
            assert isinstance(quant.elem, Float)
            value = f"{self.power_of_two(quant.rule, quant.elem.emax)}(peak)"
        elif quant.rule is Rule.UP:
            value = f"{self._power_of_two_above(quant.target)}(peak_bits)"
        else:
            value = self.over(quant.target, dtype)
            value = f"{self.power_of_two(quant.rule)}({value})" if quant.pow2 else value
        zero = " * (peak_bits > 0)" if quant.pow2 else ""
        peak = "" if quant.rule is Rule.UP else "    peak = peak_bits.to(tl.float32, bitcast=True)\n"
        text = f'''
def block_scale(peak_bits):
    """{_spell(quant)}: the scale of a block whose amax has these bits."""
{peak}    return checked_scale({value}{zero}, peak_bits)
'''
        return self.numbered("block_scale", text)

    def over(self, divisor: float, dtype: torch.dtype) -> str:
        """The quotient of `peak`, a number of the dtype, and a constant, correctly rounded."""
        if self.interpreted or not arithmetic.mends(divisor, dtype):
            return f"tl.div_rn(peak, {divisor!r})"
        return f"{self.numbered('over', arithmetic.over(divisor))}(peak)"

    def _power_of_two_above(self, top: float) -> str:
        """A function from the bits of amax to the power of two at or above amax / top, which needs no division."""
        bits = int(_bits(top), 16)
        text = f'''
def power_of_two_above(peak_bits):
    """The power of two at or above peak / {top!r}."""
    # The quotient, rounded to FP32, is a power of two only where the mantissas are equal.
    exponent = (peak_bits >> 23) - {(bits >> 23) - 127} + ((peak_bits & 0x7FFFFF) > {bits & 0x7FFFFF:#x}).to(tl.int32)
    return (tl.minimum(tl.maximum(exponent, 1), 254) << 23).to(tl.float32, bitcast=True)
'''
        return self.numbered("power_of_two_above", text)

    def numbered(self, name: str, text: str) -> str:
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

    # ---- numbers -------------------------------------------------------------------------------------------------

    def rounded(self, value: str, dtype: torch.dtype, widened: bool = False) -> str:
        """An expression for an FP32 tile rounded to a dtype, to nearest even. widened: it becomes FP32 again at once, and a
        compiler would round the numbers one by one."""
        if dtype == torch.float32:
            return value
        if dtype == torch.float16:
            return f"{value}.to(tl.float16)"
        if not self.interpreted and not widened:
            return f"{value}.to(tl.bfloat16)"
        return f"{self._either('to_bf16', arithmetic.TO_BF16, arithmetic.TO_BF16_COMPILED)}({value})"

    def divide(self) -> str:
        """A function (x, scale) -> x / scale, correctly rounded; scale broadcasts to x."""
        self.inverse_power_of_two()
        return self._either("divide", arithmetic.DIVIDE, arithmetic.DIVIDE_COMPILED)

    def bounded_reciprocal(self) -> str:
        """A function x -> 1 / x, correctly rounded, at most the largest number."""
        self.inverse_power_of_two()
        return self._either("bounded_reciprocal", arithmetic.BOUNDED, arithmetic.BOUNDED_COMPILED)

    def _either(self, name: str, interpreted: str, compiled: str) -> str:
        return self.add(name, interpreted if self.interpreted else compiled)

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

    def encode(self, elem: Elem, rounding: Rounding, within: bool = False) -> str:
        """A function from scaled values (and noise, where rounding is stochastic) to codes in the storage dtype.

        within: integers, which no value rounds beyond.
        """
        if isinstance(elem, Int):
            return self._encode_int(elem, rounding, within)
        if rounding is Rounding.RTNE and (elem in (F32, BF16, F16) or self.native(elem)):
            return self._convert(elem)
        return self._encode_float(elem, rounding)

    def _convert(self, elem: Float) -> str:
        """Codes that a conversion makes."""
        if elem in NATIVE:
            value = f"scaled.to(tl.{NATIVE[elem]})"
        else:
            self.clamp()
            assert elem.torch_dtype is not None
            value = self.rounded(f"saturate(scaled, {-elem.max!r}, {elem.max!r})", elem.torch_dtype)
        return self.add(
            f"encode_{elem}",
            f'''
def encode_{elem}(scaled):
    """{elem} codes, rounded to nearest even, saturating."""
    return {value}
''',
        )

    def _encode_int(self, elem: Int, rounding: Rounding, within: bool = False) -> str:
        storage = "int8" if elem.bits <= 8 else "int16"
        if rounding is Rounding.RTNE:
            name = f"encode_{elem}_within" if within else f"encode_{elem}"
            value = "scaled" if within else f"tl.minimum(tl.maximum(scaled, {elem.min!r}), {elem.max!r})"
            text = f'''
def {name}(scaled):
    """{elem} codes, rounded to nearest even{", of values that do not round beyond them" if within else ""}."""
    # Adding 1.5 * 2^23 leaves the rounded integer in the lowest bits.
    shifted = {value} + 12582912.0
    return shifted.to(tl.int32, bitcast=True).to(tl.{storage})
'''
            return self.add(name, text)
        argument, _ = dither.units(rounding)
        whole = self._whole_units(rounding)
        text = f'''
def encode_{elem}_{rounding}(scaled{argument}):
    """{elem} codes, {_ROUNDED[rounding]}."""
    units = {whole}(tl.minimum(tl.abs(scaled), {max(elem.max, -elem.min)!r}){argument})
    code = tl.where(scaled < 0, -units, units)
    return tl.minimum(tl.maximum(code, {int(elem.min)}), {int(elem.max)}).to(tl.{storage})
'''
        return self.add(f"encode_{elem}_{rounding}", text)

    def _whole_units(self, rounding: Rounding) -> str:
        argument, value = dither.units(rounding)
        return self.numbered(
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
        low, bits = elem.emin + 127, elem.exp + elem.man
        nearest = rounding is Rounding.RTNE
        source = "scaled.to(tl.int32, bitcast=True)" if nearest else "bits"
        sign = f"(({source} >> {31 - bits}) & {1 << bits})"
        signed = f"tl.where(code == 0, 0, {sign})" if elem.special is Special.FNUZ else sign
        storage = "uint8" if elem.bits <= 8 else "int16"
        made = f"(code | {signed}).to(tl.{storage})" + (".to(tl.float16, bitcast=True)" if elem == F16 else "")
        name, argument, lines = self._in_steps("encode", elem, rounding)
        code = [f"    code = ((exponent - {low}) << {elem.man}) + units"]
        if rounding is Rounding.SR8:
            code = [dither.code(elem)]
        if nearest:
            code = [
                "    # The exponent, moved beside the steps, is the code of the binade.",
                "    shifted = shifted.to(tl.int32, bitcast=True)",
                f"    code = (shifted >> {23 - elem.man}) + shifted - {(low + 23 - elem.man) << elem.man}",
                f"    code = code & {(1 << bits) - 1}",
            ]
        text = f'''
def {name}(scaled{argument}):
    """{elem} codes, {_ROUNDED[rounding]}, saturating."""
{lines}
{chr(10).join(code)}
    return {made}
'''
        return self.add(name, text)

    def grid(self, elem: Elem, rounding: Rounding, nan: bool = False) -> str:
        """A function from scaled values (and noise) to the values that codes stand for, in FP32; nan: NaN stays NaN."""
        if isinstance(elem, Int):
            argument, _ = dither.units(rounding)
            text = f'''
def grid_{elem}(scaled{argument}):
    """What {elem} codes stand for."""
    return {self._encode_int(elem, rounding)}(scaled{argument}).to(tl.float32)
'''
            return self.numbered(f"grid_{elem}", text)
        if rounding is Rounding.RTNE and self.native(elem):
            text = f'''
def grid_{elem}(scaled):
    """Values of {elem}, rounded to nearest even, saturating."""
    return scaled.to(tl.{NATIVE[elem]}).to(tl.float32)
'''
            return self.add(f"grid_{elem}", text)
        name, argument, lines = self._in_steps("grid", elem, rounding)
        value = f"units.to(tl.float32) * ((exponent - {elem.man}) << 23).to(tl.float32, bitcast=True)"
        if rounding is Rounding.RTNE:
            value = f"tl.fma(binade, {-(2.0 ** (23 - elem.man))!r}, shifted)"
        elif rounding is Rounding.SR8:
            value = dither.value(elem)
        signed = "(value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)"
        name += "_or_nan" if nan else ""
        text = f'''
def {name}(scaled{argument}):
    """Values of {elem}, {_ROUNDED[rounding]}, saturating."""
{lines}
    value = {value}
    sign = scaled.to(tl.int32, bitcast=True) & -0x80000000
    return {f"tl.where(scaled == scaled, {signed}, scaled)" if nan else signed}
'''
        return self.add(name, text)

    def _in_steps(self, verb: str, elem: Float, rounding: Rounding) -> tuple[str, str, str]:
        """(name, further argument, lines) of a function of scaled values.

        The lines find, where rounding is to nearest, `shifted`: the value above 2^23 steps of its `binade`; else `bits`,
        `exponent` and `units`.
        """
        low = elem.emin + 127
        if low <= elem.man or elem.emax + 127 + 23 - elem.man > 254:
            raise KernelError(f"{elem}: codes near the ends of FP32's range are not generated")
        argument, _ = dither.units(rounding)
        name = f"{verb}_{elem}" + ("" if rounding is Rounding.RTNE else f"_{rounding}")
        if rounding is Rounding.SR8:
            self.add("add_down", dither.ADD_DOWN_INTERPRETED if self.interpreted else dither.ADD_DOWN)
            return name, argument, dither.steps(elem, _bits(elem.max))
        top = f"tl.minimum(tl.abs(scaled), {elem.max!r})"
        if rounding is Rounding.RTNE:
            lines = [
                f"    magnitude = {top}",
                f"    binade = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, {low << 23:#x})",
                "    binade = binade.to(tl.float32, bitcast=True)",
                "    # Adding 2^23 steps leaves the number of steps, rounded to nearest even, in the mantissa.",
                f"    shifted = tl.fma(binade, {2.0 ** (23 - elem.man)!r}, magnitude)",
            ]
        else:
            lines = [
                "    bits = scaled.to(tl.int32, bitcast=True)",
                f"    magnitude = tl.minimum(bits & 0x7FFFFFFF, {_bits(elem.max)})",
                f"    exponent = tl.maximum(magnitude >> 23, {low})",
                f"    per_step = (({254 + elem.man} - exponent) << 23).to(tl.float32, bitcast=True)",
                f"    units = {self._whole_units(rounding)}(magnitude.to(tl.float32, bitcast=True) * per_step{argument})",
            ]
        return name, argument, "\n".join(lines)

    # ---- codes back to values ------------------------------------------------------------------------------------

    def decode(self, elem: Elem) -> str:
        """A function from unpacked codes to FP32 values."""
        if isinstance(elem, Int) or elem in (F32, BF16, F16) or self.native(elem):
            return self.add("code_values", "def code_values(code):\n    return code.to(tl.float32)")
        magnitude = (1 << (elem.exp + elem.man)) - 1
        bias = 126 + elem.emin
        factors = [2.0**bias] if bias <= 127 else [2.0 ** (bias // 2), 2.0 ** (bias - bias // 2)]
        lines = [
            "bits = code.to(tl.int32)",
            f"magnitude = bits & {magnitude}",
            "# The exponent lands in FP32's, whose bias is another.",
            f"value = (magnitude << {23 - elem.man}).to(tl.float32, bitcast=True)",
            f"value = value * {' * '.join(map(repr, factors))}",
        ]
        if elem.special is Special.FN:
            lines.append(f'value = tl.where(magnitude == {magnitude}, float("nan"), value)')
        if elem.special is Special.IEEE:
            top = ((1 << elem.exp) - 1) << elem.man
            lines.append(f'value = tl.where(magnitude == {top}, float("inf"), value)')
            lines.append(f'value = tl.where(magnitude > {top}, float("nan"), value)')
        lines.append(f"sign = (bits << {31 - elem.exp - elem.man}) & -0x80000000")
        lines.append("value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)")
        if elem.special is Special.FNUZ:
            lines.append(f'value = tl.where((bits & {2 * magnitude + 1}) == {magnitude + 1}, float("nan"), value)')
        body = "\n".join(f"    {line}" for line in [*lines, "return value"])
        return self.add(f"decode_{elem}", f'def decode_{elem}(code):\n    """FP32 values of {elem} codes."""\n{body}')

    def decode_scale(self, quant: Quant) -> str:
        """A function from stored block scales to FP32."""
        if quant.scale == E8M0:
            return self.add(
                "from_e8m0",
                '''
def from_e8m0(byte):
    """The power of two of a byte; 255 is NaN, 0 is 2^-127, a subnormal number of FP32."""
    bits = tl.maximum(byte.to(tl.int32) << 23, 1 << 22)
    return tl.where(byte == 255, float("nan"), bits.to(tl.float32, bitcast=True))
''',
            )
        return self.decode(quant.scale)

    def unpack_nibbles(self, signed: bool) -> str:
        """A function from bytes to two 4-bit codes each; signed: as signed integers."""
        sign = "code = tl.where(code > 7, code - 16, code)" if signed else ""
        lines = [
            "low = (packed & 15).to(tl.int32)",
            "high = (packed >> 4).to(tl.int32)",
            "code = tl.reshape(tl.join(low, high), (packed.shape[0], packed.shape[1] * 2))",
            *([sign] if signed else []),
            "return code",
        ]
        body = "\n".join(f"    {line}" for line in lines)
        return self.numbered(
            "unpack_nibbles", f'def unpack_nibbles(packed):\n    """Two codes a byte, the low nibble first."""\n{body}'
        )


_ROUNDED = {
    Rounding.RTNE: "rounded to nearest even",
    Rounding.TRUNC: "rounded toward zero",
    Rounding.SR: "rounded stochastically",
    Rounding.SR8: "rounded stochastically",
}


def _bits(value: float) -> str:
    """The FP32 bits of a number, as text."""
    import struct

    return f"0x{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def _spell(quant: Quant) -> str:
    """What a scale depends on, for a docstring."""
    return f"{quant.rule} for {quant.elem}" + (f", clip {quant.clip!r}" if quant.clip != 1.0 else "")


NATIVE = {E4M3: "float8e4nv", E5M2: "float8e5"}  # Triton's names


def pointer(dtype: torch.dtype) -> str:
    """The Triton type of a pointer to a torch dtype."""
    return POINTERS[dtype]
