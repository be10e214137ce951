"""Bugs planted in generated text are found: a wrong scale index, a dropped mask on the tail, signs on the wrong operand."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from lpcompile.codegen import emit, module
from lpcompile.codegen.example import Example, example, mismatch
from lpcompile.codegen.source import Schedule, Sizes, Source
from lpcompile.kernel import parse
from lpcompile.target import find_target

CAST = "cast x0:bf16 = x0 as bf16 -> e4m3:1x128|1"
GEMM = "gemm e4m3:1x128|1 @ e4m3:128x128|1' -> bf16"
MEMORY = "cast x0:bf16 = x0 as bf16 -> int8:tensor|1|1:h448"
TURNED = "cast x0:bf16 = x0 as bf16 -> e4m3:1x32:e8m0:up|1|1:h32drawn, e4m3:1x32:e8m0:up|0|0:h32drawn'"
TILES = {CAST: (32, 128), GEMM: (32, 32, 128), TURNED: (32, 64), MEMORY: (32, 128)}


def generated(text: str, sizes: tuple[int, ...]) -> Source:
    target = "sm_90" if text == GEMM else "interpret"  # there is inline assembly in casts for GPUs
    return emit(parse(text), Sizes.of(*sizes), find_target(target), Schedule(TILES[text], 4, 1))


def call(text: str, sizes: tuple[int, ...]) -> Example:
    """Inputs behind which memory holds large numbers: what is read beyond the end shows."""
    made = example(parse(text), sizes)
    for index, x in enumerate(made.inputs):
        guarded = torch.full((x.numel() + 65536,), 100.0, dtype=torch.float32).to(x.dtype)
        guarded[: x.numel()] = x.flatten()
        made.inputs[index] = guarded[: x.numel()].view(x.shape)
    return made


def judge(source: Source, made: Example) -> str | None:
    found = module.load(source).launch(made.inputs, made.sizes, made.seed, made.uses, made.spins)
    return mismatch(made.kernel, found, made.reference())


PLANTED = {
    "the scale of another block (cast)": (CAST, (40, 300), r"col0 // 128", "0"),
    "the scale of another block (product)": (GEMM, (72, 200, 300), r"(b_scale .*) \+ step\)", r"\1)"),
    "no mask on the tail (cast)": (CAST, (40, 300), r"(tl\.load\(.*), mask=.*, other=0(?:\.0)?\)", r"\1)"),
    "the signs of the other operand": (TURNED, (40, 96), r"spins\[1\]", "spins[2]"),
    "signs behind the rotation": (TURNED, (40, 96), r"(drawn_signs\(stream_key.*32\))\[:, None\]", r"\1[None, :]"),
    "the smallest for the amax (turned in memory)": (MEMORY, (200, 440), r"(atomic_max\(peaks\w*, )tl\.max", r"\1tl.min"),
    "no mask on the tail (product)": (GEMM, (72, 200, 300), r"(tl\.load\(\w_tile[^,]*), mask=[^=]*other=0(?:\.0)?\)", r"\1)"),
}


@pytest.mark.parametrize(("text", "sizes", "pattern", "wrong"), PLANTED.values(), ids=PLANTED)
def test_planted_bugs_are_found(text: str, sizes: tuple[int, ...], pattern: str, wrong: str):
    source, made = generated(text, sizes), call(text, sizes)
    assert judge(source, made) is None
    mutated, count = re.subn(pattern, wrong, source.text)
    assert count, "the text has no such place any more: plant the bug where it is now"
    assert judge(replace(source, text=mutated), made) is not None
