"""What bears codes of a few bits, times their block scales, to an instruction that was made for others."""

from __future__ import annotations

from lpcompile.formats import Float, Quant

# 29 binades below a power of two a row. Scales of blocks make at most six times amax of the largest code: with a headroom of
# eight nothing saturates.
CARRIER = Quant.parse("e5m2:row:up:clip=8.0")


def carried(quant: Quant) -> bool:
    """True where CARRIER holds code times block scale exactly, unless the block is smaller than its row by a factor of 2^24:
    such numbers lose bits, or become 0, and sums in FP32 would lose them beside the row's largest as well."""
    few = isinstance(quant.elem, Float) and quant.elem.man <= 2 and quant.elem.exp <= 3
    return few and quant.pow2 and quant.block.cols > 0 and not quant.block.symmetric and quant.clip <= 2.0
