"""Roundings and divisions in fewer instructions than a compiler takes: a true division is a dozen, and a call that ties up
registers. Each text comes with the one that Triton's interpreter runs."""

from __future__ import annotations

import functools

import torch

assert __name__ == "lpcompile.codegen.arithmetic", "import it as lpcompile.codegen, not as codegen"

DIVIDE = '''
def divide(x, scale):
    """x / scale."""
    return tl.div_rn(x, scale)
'''
# Calls inverse_power_of_two. Without a negation, which takes an instruction a number, and registers.
DIVIDE_COMPILED = '''
def divide(x, scale):
    """x / scale, correctly rounded: the quotient by the reciprocal, mended by its exact remainder (Markstein 1990)."""
    # Between 1 and 2 neither the reciprocal nor a remainder overflows or vanishes.
    unit = tl.maximum(scale.to(tl.int32, bitcast=True) & 0x7F800000, 0x00800000).to(tl.float32, bitcast=True)
    per_unit = inverse_power_of_two(unit)
    scale = scale * per_unit
    negative = x * -per_unit
    # One Newton step rounds the hardware's estimate correctly: true of each of the 2^23 mantissas.
    near = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [scale], tl.float32, True, 1)
    reciprocal = -tl.fma(tl.fma(-scale, near, 1.0), near, near)
    quotient = negative * reciprocal
    # The remainder is taken negative: that of -0 leaves its sign alone.
    return tl.fma(tl.fma(scale, quotient, negative), reciprocal, quotient)
'''

BOUNDED = '''
def bounded_reciprocal(x):
    """1 / x, at most the largest number."""
    inverse = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)
    return tl.where(inverse < 3.4028234663852886e+38, inverse, 3.4028234663852886e+38)
'''
# Calls inverse_power_of_two.
BOUNDED_COMPILED = '''
def bounded_reciprocal(x):
    """1 / x for x >= 0 that are not huge, correctly rounded, at most the largest number."""
    unit = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 0x00800000).to(tl.float32, bitcast=True)
    per_unit = inverse_power_of_two(unit)
    mantissa = x * per_unit
    near = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [mantissa], tl.float32, True, 1)
    # That of 0 is no number here, and the smaller of it and a number is the number.
    return tl.minimum(tl.fma(tl.fma(-mantissa, near, 1.0), near, near) * per_unit, 3.4028234663852886e+38)
'''
TO_BF16 = '''
def to_bf16(x):
    """BF16, rounded to nearest even: the interpreter's own conversion truncates."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
'''
TO_BF16_COMPILED = '''
def to_bf16(x):
    """BF16, rounded to nearest even, in pairs: the instruction for one number has an eighth of the throughput."""
    return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, True, 2)
'''


def over(divisor: float) -> str:
    """The text of a division by a constant for which `mends` holds."""
    reciprocal = inverse(divisor)
    return f'''
def over(peak):
    """peak / {divisor!r}, correctly rounded if peak has 16 bits: the quotient by the reciprocal, mended by its rest."""
    quotient = peak * {reciprocal!r}
    return tl.fma(tl.fma(quotient, {-divisor!r}, peak), {reciprocal!r}, quotient)
'''


def inverse(divisor: float) -> float:
    """1 / divisor in FP32."""
    return float(1.0 / torch.tensor(divisor, dtype=torch.float32))


@functools.cache
def mends(divisor: float, dtype: torch.dtype) -> bool:
    """True where for each positive number a of a 16-bit dtype q + (a - divisor q) r, of two rounded operations with
    q = a r rounded and r = `inverse(divisor)`, is a / divisor, correctly rounded."""
    if dtype.itemsize != 2:
        return False
    numbers = torch.arange(1, 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()].float()
    narrow = torch.tensor(divisor, dtype=torch.float32)
    quotient = numbers * inverse(divisor)
    # Both have fewer than 53 bits.
    rest = (numbers.double() - narrow.double() * quotient.double()).float()
    wanted = numbers / narrow
    # What the last addition rounds lies closer to the quotient than half a step to the next number below.
    step = (wanted - wanted.nextafter(torch.zeros(()))).double()
    off = (quotient.double() - wanted.double()) + rest.double() * inverse(divisor)
    return bool((off.abs() < step * (0.5 - 2.0**-20)).all())
