"""Absolute values as integers: what an amax compares. Numbers of 16 bits stay two to a register, and to an instruction."""

from __future__ import annotations

import torch

from lpcompile.codegen.fragments import Fragments

assert __name__ == "lpcompile.codegen.magnitudes", "import it as lpcompile.codegen, not as codegen"


def integer(dtype: torch.dtype) -> str:
    """The type of the magnitudes of numbers of `dtype`."""
    return f"tl.int{8 * dtype.itemsize}"


def magnitudes(dtype: torch.dtype, fragments: Fragments) -> str:
    """A function of numbers of `dtype`: their magnitudes."""
    return fragments.add(
        f"magnitudes_{8 * dtype.itemsize}",
        f'''
def magnitudes_{8 * dtype.itemsize}(x):
    """|x| as integers. They order as the numbers do, infinities and NaNs on top."""
    return x.to({integer(dtype)}, bitcast=True) & 0x7F{"FF" * (dtype.itemsize - 1)}
''',
    )


def bits(found: str, dtype: torch.dtype) -> str:
    """What magnitudes of numbers of `dtype` are for numbers of FP32. Triton widens them where it reduces along an axis."""
    if dtype == torch.float32:
        return found
    if dtype == torch.bfloat16:
        return f"{found}.to(tl.int32) << 16"
    return f"{found}.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)"
