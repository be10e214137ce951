"""Plain casts in the interpreter: bitwise the reference's, whatever the shape, the tiling and the content."""

from __future__ import annotations

import pytest
import torch
from casting import bits, check, run, sample

from lpcompile.codegen.source import Schedule
from lpcompile.kernel import DTYPES

KERNELS = (
    "cast x0:bf16 = x0 as bf16 -> e4m3:row:up|1, e4m3:row:up|0'",
    "cast x0:bf16 = x0 as bf16 -> e4m3:1x128|1, e4m3:1x128|0'",
    "cast x0:bf16 = x0 as bf16 -> e4m3:1x32:e8m0:up|1, e4m3:1x32:e8m0:up|0'",
    "cast x0:f32 = x0 as f32 -> e5m2:tensor|1, e5m2:tensor|1'",
    "cast x0:f16 = x0 as f16 -> int8:row|1, int8:row|0, int8:tensor|1'",
    "cast x0:bf16 = x0 as bf16 -> e4m3:128x128|1, e4m3:1x128|0, e4m3:1x128|1'",
)
SHAPES = ((37, 200), (1, 1), (130, 257), (256, 128))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", KERNELS)
def test_bitwise(text: str, shape: tuple[int, int]) -> None:
    dtype = DTYPES[text.split(":")[1].split(" ", maxsplit=1)[0]]
    for broken in (False, True):
        check(*run(text, [sample(shape, dtype, broken)]))
    check(*run(text, [sample(shape, dtype)], symbolic=True))


def test_any_tile_gives_the_same() -> None:
    x = sample((130, 257))
    for tile in ((64, 128), (128, 128)):
        check(*run(KERNELS[2], [x], schedule=Schedule(tile, 4)))


def test_masks_where_nothing_is_provable() -> None:
    """Poison beyond the matrix must not reach an amax, and what lies beyond a result must stay."""
    whole = torch.full((256, 512), float("nan"), dtype=torch.bfloat16)
    x = sample((130, 257))
    whole.flatten()[: x.numel()] = x.flatten()
    found, expected = run(KERNELS[0], [whole.flatten()[: x.numel()].view(130, 257)])
    check(found, expected)
    assert not torch.equal(bits(found[0]), bits(expected[0].mT.reshape(130, 257)))
