"""Stochastic rounding: up where the fraction is at least 1 - noise.

By 8 random bits, as the hardware's cvt.rs does it, they are added below the last bit that stays, and cut off.
"""

from __future__ import annotations

from lpcompile.formats import Float, Rounding

assert __name__ == "lpcompile.codegen.dither", "import it as lpcompile.codegen, not as codegen"

# x + y for y >= x >= 0 or y = 0, cut off where it does not fit: rounded, it could pass the next number of the grid.
ADD_DOWN = '''
def add_down(x, y):
    """x + y, rounded toward zero."""
    return tl.inline_asm_elementwise("add.rz.f32 $0, $1, $2;", "=r,r,r", [x, y], tl.float32, True, 1)
'''
ADD_DOWN_INTERPRETED = '''
def add_down(x, y):
    """x + y, rounded toward zero."""
    total = x + y
    return tl.where(total - y > x, total.to(tl.int32, bitcast=True) - 1, total.to(tl.int32, bitcast=True)).to(
        tl.float32, bitcast=True
    )
'''


def steps(elem: Float, top: str) -> str:
    """Lines from `scaled` and `noise` to `moved`: bits of the magnitude on the grid, plus `base` where that is not 0.

    top: the bits of the largest magnitude, as text. Below the smallest normal number steps are those of its binade: adding that
    number moves the magnitude there.
    """
    least = 2.0**elem.emin
    lines = [
        "bits = scaled.to(tl.int32, bitcast=True)",
        f"magnitude = tl.minimum(bits & 0x7FFFFFFF, {top}).to(tl.float32, bitcast=True)",
        f"base = tl.where(magnitude < {least!r}, {least!r}, 0.0)",
        f"moved = add_down(magnitude, base).to(tl.int32, bitcast=True) + (noise.to(tl.int32) << {15 - elem.man})",
    ]
    return "\n".join(f"    {line}" for line in lines)


def code(elem: Float) -> str:
    """Lines from `moved` to `code`, without its sign."""
    start = (elem.emin + 127) << elem.man
    return f"    code = (moved >> {23 - elem.man}) - tl.where(base > 0, {start}, {start - (1 << elem.man)})"


def value(elem: Float) -> str:
    """What `moved` stands for, as text."""
    return f"(moved & {-(1 << (23 - elem.man))}).to(tl.float32, bitcast=True) - base"


def units(rounding: Rounding) -> tuple[str, str]:
    """(further argument, how a magnitude becomes an integer)."""
    if not rounding.stochastic:
        return "", "low"
    # A sum of fraction and noise would be rounded where this is exact.
    noise = "noise" if rounding is Rounding.SR else "noise.to(tl.float32) * 0.00390625"
    return ", noise", f"low + (magnitude - low.to(tl.float32) >= 1.0 - {noise}).to(tl.int32)"
