"""Division by a scale that serves many numbers. A true division costs a dozen instructions a number, this four."""

assert __name__ == "lpcompile.codegen.division", "import it as lpcompile.codegen, not as codegen"

INTERPRETED = '''
def divide(x, scale):
    """x / scale."""
    return tl.div_rn(x, scale)
'''
# Calls inverse_power_of_two. Without a negation, which takes an instruction a number, and registers.
COMPILED = '''
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
