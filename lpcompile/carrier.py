"""What bears codes of a few bits, times their block scales, to an instruction that was made for others."""

from __future__ import annotations

import math
from dataclasses import replace

from lpcompile.formats import Float, Quant, Rule

# 29 binades below a power of two a row.
CARRIER = Quant.parse("e5m2:row:up:clip=2.0")


def carried(quant: Quant) -> bool:
    """True where CARRIER holds code times block scale exactly, unless the block is much smaller than its row.

    From a factor of 2^26 on (2^22 behind a rotation of 128) codes lose bits, then blocks vanish. FP32 sums lose numbers beside
    others that are 2^24 times as large, and an FP8 instruction's sums earlier.
    """
    few = isinstance(quant.elem, Float) and quant.elem.man <= 2 and quant.elem.exp <= 3
    # The paper's rule has a scale for numbers that are far below it, which stochastic rounding may make as large.
    bounded = quant.clip <= 2.0 and not (quant.rule is Rule.QUEST_PAPER and quant.stochastic)
    return few and bounded and quant.pow2 and quant.block.cols > 0 and not quant.block.symmetric


def carrying(turned: int = 1) -> Quant:
    """The carrier of values that were turned in blocks of so many, under a scale of what they were before.

    Rounding makes no number of a block more than twice its amax, which a rotation raises by the root of its length.
    """
    return replace(CARRIER, clip=CARRIER.clip * 2.0 ** math.ceil(math.log2(turned) / 2))
