"""Runs a generated Cast, Requant or Decode in the interpreter beside its reference."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import sympy
import torch
from torch import Tensor

from lpcompile.codegen import module
from lpcompile.codegen.cast import cast_schedules, emit_cast
from lpcompile.codegen.source import Schedule, Sizes
from lpcompile.fused import fused_reference
from lpcompile.kernel import CastKernel, DecodeKernel, RequantKernel, parse
from lpcompile.target import Target

INTERPRET = Target("interpret", {"f32": 1.0, "bf16": 1.0}, bandwidth=1.0, launch=1.0)
SYMBOLS = tuple(sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s1"))


def sample(shape: Sequence[int], dtype: torch.dtype = torch.bfloat16, broken: bool = False) -> Tensor:
    """Normal numbers over several binades, the same at each call, with a block of zeros; broken: and a NaN and an infinity."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, generator=generator) * torch.exp2(torch.randint(-6, 6, tuple(shape), generator=generator))
    x[: shape[0] // 2, : shape[1] // 3] = 0.0
    if broken:
        x[0, 0], x[-1, -1] = float("nan"), float("inf")
    return x.to(dtype)


def bits(x: Tensor) -> Tensor:
    """What has to be equal: the bits, with one NaN for all."""
    if not x.is_floating_point():
        return x
    if x.itemsize == 1:
        return torch.where(x.float().isnan(), 255, x.view(torch.uint8))
    return torch.where(x.isnan(), float("nan"), x).view(torch.int16 if x.itemsize == 2 else torch.int32)


_GUARD = 1 << 16  # bytes before and behind what a kernel writes


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """What is allocated inside lies between bytes that nobody may write."""
    real, buffers = torch.empty, []

    def empty(shape: Sequence[int], dtype: torch.dtype, **options: Any) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        buffer = real(size + 2 * _GUARD, dtype=torch.uint8, **options).fill_(0xA5)
        buffers.append(buffer)
        return buffer[_GUARD : _GUARD + size].view(dtype).view(shape)

    with mock.patch.object(torch, "empty", empty):
        yield
    for buffer in buffers:
        assert buffer[:_GUARD].eq(0xA5).all() and buffer[-_GUARD:].eq(0xA5).all(), "written beyond the end"


def run(
    text: str,
    inputs: Sequence[Tensor],
    sizes: Sequence[int] = (),
    symbolic: bool = False,
    schedule: Schedule | None = None,
    **random: object,
) -> tuple[list[Tensor], list[Tensor]]:
    """(what the generated kernel writes, what the reference says)."""
    kernel = parse(text)
    assert isinstance(kernel, CastKernel | RequantKernel | DecodeKernel)
    shape = (inputs[0].shape[0], *sizes) if sizes else inputs[0].shape
    known = Sizes.of(*(SYMBOLS if symbolic else shape))
    schedule = schedule or cast_schedules(kernel, known, INTERPRET)[0]
    loaded = module.load(emit_cast(kernel, known, INTERPRET, schedule))
    assert text == loaded.KERNEL
    with guarded():
        written = loaded.launch(list(inputs), list(sizes), **random)
    return written, fused_reference(list(inputs), text, list(sizes), **random)


def check(written: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Bitwise equality, which a zeroed or a permuted result must not pass."""
    for index, (found, wanted) in enumerate(zip(written, expected, strict=True)):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), index
        differs = bits(found).ne(bits(wanted))
        assert not differs.any(), (
            f"part {index}: {int(differs.sum())} of {differs.numel()}, first {differs.nonzero()[0].tolist()}"
        )
        if index == 0 and wanted.numel() > 1 and bits(wanted).any():
            assert not torch.equal(bits(found), torch.zeros_like(bits(found)))
            assert not torch.equal(bits(found).flatten().roll(1), bits(wanted).flatten())
