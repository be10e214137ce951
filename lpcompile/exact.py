"""Sums that come out the same in any order.

A kernel adds in an order that is nobody's to promise, and one bit of a sum can decide about a code or a scale. So what
decides is made of numbers in steps: multiples of a power of two that is coarse enough for FP32 to hold every sum exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lpcompile.formats import EDEN_CLIP, Quant, Rule

_HELD = 2.0**24  # integers that FP32 holds
_DOWN = 1.5  # a block scale of E4M3 is at most this factor too small, and vanishes otherwise
_COARSEST = 0.25  # exact for a block of 2^15, more than a kernel's tile


def step_of(quant: Quant, count: int) -> float:
    """The step of the sums over a block of `count` that decide in 4-over-6 and in MS-EDEN: the finest power of two of whose
    multiples FP32 adds as many squares exactly, and 1/4 for blocks that no kernel holds: the reference adds in FP64.

    MS-EDEN sums scaled values, 4-over-6 their distances to the codes.
    """
    if quant.rule is Rule.EDEN:
        most = _DOWN * quant.target / EDEN_CLIP
    else:
        most = max(_DOWN * quant.target - quant.elem.max, quant.elem.max - 4.0)
    return float(min(2.0 ** -math.floor(math.log2(math.sqrt(_HELD / count) / most)), _COARSEST))


def magic(step: float) -> float:
    """Added to a number and taken off again in FP32, it leaves the nearest multiple of `step` (RTNE)."""
    return 1.5 * 2.0**23 * step


def in_steps(x: Tensor, step: float) -> Tensor:
    """The nearest multiples of `step` (RTNE)."""
    return torch.round(x / step) * step
