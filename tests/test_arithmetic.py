"""Divisions that generated kernels carry out with a reciprocal, against C's fused multiply-add and true quotients."""

from __future__ import annotations

import ctypes
import ctypes.util

import pytest
import torch

from lpcompile.codegen import arithmetic, emit, schedules
from lpcompile.codegen.source import Sizes
from lpcompile.kernel import parse
from lpcompile.target import find_target

_fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
_fmaf.restype, _fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3


def _differing(divisor: float, dtype: torch.dtype) -> int:
    """Positive numbers of 16 bits whose mended quotient is not the true one."""
    numbers = torch.arange(1, 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()].float()
    narrow, inverse = float(torch.tensor(divisor)), arithmetic.inverse(divisor)
    quotients = (numbers * inverse).tolist()
    found = [_fmaf(_fmaf(q, -narrow, a), inverse, q) for a, q in zip(numbers.tolist(), quotients, strict=True)]
    return int((torch.tensor(found) != numbers / narrow).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divisor", [448.0, 57344.0, 127.0, 448.0 / 0.9, 0.75])
def test_a_constant_divides_where_it_says(divisor: float, dtype: torch.dtype) -> None:
    wrong = _differing(divisor, dtype)
    assert not (arithmetic.mends(divisor, dtype) and wrong)
    if divisor in (448.0, 57344.0, 127.0):
        assert arithmetic.mends(divisor, dtype) and wrong == 0
    assert not arithmetic.mends(divisor, torch.float32)


def test_some_constants_do_not_divide() -> None:
    """What the test above could show: there are divisors that are refused, and numbers for which they must be."""
    assert not arithmetic.mends(0.75, torch.bfloat16) and _differing(0.75, torch.bfloat16) > 0


def test_numbers_of_more_bits_are_divided() -> None:
    for dtype, used in (("bf16", True), ("f32", False)):
        kernel = parse(f"cast x0:{dtype} = x0 as {dtype} -> e4m3:1x128|1")
        target, sizes = find_target("sm_90"), Sizes.of(256, 256)
        text = emit(kernel, sizes, target, schedules(kernel, sizes, target)[0]).text
        assert ("over(peak)" in text) is used and ("tl.div_rn(peak, 448.0)" in text) is not used
