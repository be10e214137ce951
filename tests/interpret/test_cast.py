"""Casts in the interpreter: bitwise the reference's, whatever the shape, the tiling and the content."""

from __future__ import annotations

import pytest
import torch
from casting import bits, check, run, sample

from lpcompile import reference
from lpcompile.carrier import CARRIER
from lpcompile.codegen.source import Schedule
from lpcompile.errors import KernelError
from lpcompile.kernel import CastKernel, parse

SEED = torch.tensor([123456789012345], dtype=torch.int64)
NVFP4 = "e2m1:1x16:e4m3+f32"
BF16 = "cast x0:bf16 = x0 as bf16 -> "
PLAIN = (
    BF16 + "e4m3:row:up|1, e4m3:row:up|0'",
    BF16 + "e4m3:1x32:e8m0:up|1, e4m3:1x32:e8m0:up|0', e5m2:1x32:e8m0:floor|1#",
    BF16 + "e4m3:128x128|1, e4m3:1x128|0, e4m3:1x128|1'",
    # In parts: blocks of one lie across those of the other.
    "cast x0:bf16 x1:bf16 = mul(silu(x0), x1) as bf16 -> keep, e4m3:1x128|1, e4m3:1x128|0|0:h32fixed'",
    "cast x0:f32 = x0 as f32 -> e5m2:tensor|1, e5m2:tensor|1'",
    "cast x0:f16 = x0 as f16 -> int8:row|1, int8:row|0, int8:tensor|1'",
)
ELEMENTS = (
    BF16 + "e3m2:tensor:clip=0.75|1, int4:1x32|0', e5m6:1x128|1, e4m3fnuz:1x32|1, int16:tensor|1",
    BF16 + "e2m3:1x32:e8m0:nearest|1, int5:1x16|1, int8full:row|1, bf16:tensor|1, f32:1x32|0, e5m2:tensor:trunc|1",
)
RULES = (
    BF16 + "e2m1:1x32:e8m0:quest|1, e2m1:1x32:e8m0:quest|0', e2m1:1x32:e8m0:questpaper|0",
    BF16 + f"{NVFP4}|1, {NVFP4}:4over6|0', e2m1:16x16:e4m3+f32|1#",
    BF16 + f"{NVFP4}:eden|1, {NVFP4}:eden|0'",
    BF16 + f"{NVFP4}:sr|1, e2m1:1x32:e8m0:matched:sr|0', e4m3:1x128:sr8|1, int8:row:sr|0'",
    BF16 + f"{NVFP4}:sr8|1, {NVFP4}:sr8|0', e3m2:1x32:e8m0:up:sr8|1~, int8:row:sr8|0'",
    BF16 + f"{NVFP4}|1~, e2m1:1x32:e8m0:quest|0~', int8:row|0~, e4m3:1x128|1~",
    BF16 + f"e2m1:1x32:e8m0:quest|1~{CARRIER}, e2m1:1x32:e8m0:up|0~{CARRIER}', e3m2:1x32:e8m0:matched:sr|1~{CARRIER}",
    BF16 + f"e2m1:1x32:e8m0:quest|1~{CARRIER}, e2m1:1x32:e8m0:quest|1, e2m1:1x32:e8m0:up|0', e2m1:1x32:e8m0:up|0~'",
    BF16 + "int12:1x32:up|0~, int12:1x32:up|1~",
)
PROLOGUES = (
    # SwiGLU as PyTorch takes it apart.
    "cast x0:bf16 x1:bf16 = bf16(mul(bf16(div(x0, add(exp(neg(x0)), 1.0))), x1)) as bf16 -> e4m3:row:up|1, e4m3:1x32|0'",
    "cast x0:f32 x1:f32[c] x2:bf16[r] = add(mul(x0, x1), x2) as bf16 -> keep, e4m3:row:up|1, e4m3:1x128|0'",
    "cast x0:bf16 x1:bf16 = bf16(mul(maximum(x0, x1), rsqrt(add(abs(x1), 0.5)))) as f32 -> keep, e4m3:row|1",
    # Two matrices: rows that a program holds, scales that tiles share, and blocks across each other, which come in parts.
    "cast x0:bf16 x1:bf16 = mul(x0, x1); neg(x1) as bf16 -> e4m3:row:up|1; int8:row|1",
    "cast x0:bf16 x1:bf16 x2:f32[r] = mul(x0, x1); add(x1, x2) as bf16 -> e4m3:row:up|0'; e4m3:tensor|1, int8:row|0'",
    "cast x0:bf16 x1:f32[c] = mul(x0, x1); neg(x0) as bf16 -> e4m3:1x128|0', e4m3:1x128|1; e4m3:1x128|1, e4m3:1x128|0'",
    "cast x0:bf16 x1:bf16 = maximum(x0, x1); x1 as f16 -> e2m1:1x32:e8m0:matched:sr|1; e2m1:1x16:e4m3+f32|0~', int8:1x32|0",
    "cast x0:bf16 x1:f16 = div(relu(sub(neg(x0), x1)), f16(sqrt(add(abs(x0), 1.0)))) as f16 -> int8:1x32|0'",
)


def inputs_of(text: str, shape: tuple[int, int], broken: bool) -> list[torch.Tensor]:
    kernel = parse(text)
    assert isinstance(kernel, CastKernel)
    shapes = {"": shape, "r": (shape[0], 1), "c": (shape[1], 1)}
    found = [sample(shapes[each.vector], each.dtype, broken and not index) for index, each in enumerate(kernel.inputs)]
    return [x.flatten() if each.vector else x for x, each in zip(found, kernel.inputs, strict=True)]


def random_of(text: str) -> dict[str, object]:
    count = len(parse(text).outputs)
    return {"seed": SEED, "uses": list(range(3, 3 + count)), "spins": list(range(11, 11 + 2 * count))}


@pytest.mark.parametrize("text", PLAIN + ELEMENTS + RULES + PROLOGUES)
def test_bitwise(text: str) -> None:
    """Odd shapes, one element, tails, NaN and infinity; sizes as numbers and as symbols."""
    for shape, broken, symbolic in (((37, 200), True, False), ((130, 257), False, True), ((1, 1), False, False)):
        check(*run(text, inputs_of(text, shape, broken), symbolic=symbolic, **random_of(text)))


@pytest.mark.parametrize("text", [*PLAIN[:2], RULES[3]])
def test_bitwise_without_masks(text: str) -> None:
    check(*run(text, inputs_of(text, (256, 128), False), **random_of(text)))


@pytest.mark.parametrize("shape", [(192, 64), (64, 320)])
def test_a_part_of_a_tile_beyond_the_end(shape: tuple[int, int]) -> None:
    """Parts of 64 divide these sizes, tiles of 128 do not: the last tile's second part lies outside."""
    check(*run(PLAIN[3], inputs_of(PLAIN[3], shape, False), **random_of(PLAIN[3])))


def test_any_tile_gives_the_same() -> None:
    x = sample((130, 257))
    for tile in ((64, 128), (32, 256)):
        for text in (PLAIN[1], RULES[3]):
            check(*run(text, [x], schedule=Schedule(tile, 4), **random_of(text)))
    for schedule in (Schedule((128, 128), 4, step=32), Schedule((128, 128), 8, registers=128)):
        check(*run(PLAIN[3], inputs_of(PLAIN[3], (130, 257), True), schedule=schedule, **random_of(PLAIN[3])))


def test_what_lies_beside_the_matrix_is_not_read() -> None:
    """Poison behind the last element must not reach an amax; a mask that is forgotten shows."""
    x = sample((130, 257))
    memory = torch.full((300 * 512,), float("nan"), dtype=torch.bfloat16)
    memory[: x.numel()] = x.flatten()
    found, expected = run(PLAIN[0], [memory[: x.numel()].view(130, 257)])
    check(found, expected)
    assert not torch.equal(bits(found[2]).mT, bits(found[0]))


def test_no_integer_beyond_the_largest_code() -> None:
    """16-bit numbers are rounded without a clamp: rows whose amax is each subnormal number, and numbers of each binade."""
    positive = torch.cat([torch.arange(1, 128), torch.arange(128, 0x7F80, 73)]).to(torch.int16).view(torch.bfloat16)
    x = torch.stack([positive, -positive, positive / 2, positive / 3], dim=1)
    for text in ("int8:row|1", "int8:row|1, int4:row|0'", "int3:1x4|1"):
        check(*run(BF16 + text, [x]))
    found, _ = run(BF16 + "int8:row|1", [x])
    assert found[0][:, 0].eq(127).all() and found[0][:, 1].eq(-127).all()
    # A subnormal FP32 amax has few bits: its scale may be so small that 190 times it is the amax, and codes are clamped.
    tiny = torch.tensor([[190.0, -190.0, 64.0, 1.0]]) * 2.0**-149
    check(*run("cast x0:f32 = x0 as f32 -> int8:row|1", [tiny]))


def test_two_matrices_are_told_apart() -> None:
    """What the second prologue makes is none of what the first makes."""
    text = "cast x0:bf16 x1:bf16 = mul(x0, x1); x1 as bf16 -> e4m3:row:up|1, e4m3:row:up|0'; e4m3:row:up|1, e4m3:row:up|0'"
    found, expected = run(text, [sample((70, 96)), sample((70, 96)) * 3])
    check(found, expected)
    alone, _ = run(BF16 + "e4m3:row:up|1, e4m3:row:up|0'", [sample((70, 96)) * 3])
    check(found[4:], alone)
    assert not torch.equal(bits(found[0]), bits(found[4])) and not torch.equal(bits(found[2]), bits(found[6]))


@pytest.mark.parametrize("rule", ["4over6", "eden"])
def test_what_decides_is_summed_in_steps(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(7))
    x[0, 0] = 100.0
    # Blocks that vanish under the scale for 6, and some of which live under that for 4.
    x[1] *= torch.linspace(0.1, 0.7, 256) * 2**-9 * 100 / 256 / x[1].abs().max()
    text, inputs = f"{BF16}{NVFP4}:{rule}|1, {NVFP4}:{rule}|1~", [x.bfloat16()]
    chance = {"seed": SEED, "uses": [3, 3]} if rule == "eden" else {}
    found, wanted = run(text, inputs, **chance)
    check(found, wanted)
    monkeypatch.setattr(reference, "in_steps", lambda values, _step: values)
    _, exact = run(text, inputs, **chance)
    scales = [bits(each[1]) for each in (wanted, exact)]
    assert 0 < int((scales[0] != scales[1]).sum()) < 100, "sums that are not rounded decide otherwise, here and there"


def test_streams_differ() -> None:
    x = sample((64, 64))
    text = BF16 + "e2m1:1x32:e8m0:up:sr|1"
    first, _ = run(text, [x], seed=SEED, uses=[3])
    again, _ = run(text, [x], seed=SEED, uses=[3])
    other, _ = run(text, [x], seed=SEED, uses=[4])
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    "text",
    [
        BF16 + "e2m1:row:quest|1",
        BF16 + "e4m3:1x48|1",
        BF16 + "bf16:tensor:sr|1",
        BF16 + "e4m3:1x128|1|1:h344",
    ],
)
def test_what_is_not_generated_says_so(text: str) -> None:
    with pytest.raises(KernelError):
        run(text, [sample((64, 96))], **random_of(text))
