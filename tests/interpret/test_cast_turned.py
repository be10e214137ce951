"""Rotated casts, and casts of what codes stand for, in the interpreter: bitwise the reference's.

Inputs of rotations are small integers times a power of two, so that every sum is exact in whatever order.
"""

from __future__ import annotations

import pytest
import torch
from casting import bits, check, run, sample

from lpcompile import ops
from lpcompile.carrier import carrying
from lpcompile.codegen import in_memory, turn
from lpcompile.kernel import DecodeKernel, RequantKernel, parse
from lpcompile.recipe import folds
from lpcompile.target import Target

SEED = torch.tensor([987654321], dtype=torch.int64)
NVFP4 = "e2m1:1x16:e4m3+f32"
BF16 = "cast x0:bf16 = x0 as bf16 -> "
TURNED = (
    BF16 + f"e4m3:1x32:e8m0:up|1|1:h32, {NVFP4}:sr|0|0:h16fixed'",
    BF16 + "int8:tensor|1|0:h16|1:h32, int8:tensor|1|1:h128fixed', int8:row|1|0:h64drawn",
    "cast x0:f32 = x0 as f32 -> e2m1:1x32:e8m0:quest|1|1:h32drawn, e4m3:tensor|1|0:h128'",
    BF16 + f"e2m1:1x32:e8m0:quest|1|1:h32~{carrying(32)}, e2m1:1x32:e8m0:quest|1|1:h32",
)
REQUANTS = (
    "requant e2m1:1x32:e8m0:quest|1|1:h32 as bf16 -> e2m1:1x32:e8m0:matched|0|0:h32drawn'",
    f"requant {NVFP4}:4over6|1 as bf16 -> {NVFP4}:eden|0|0:h128drawn', {NVFP4}:eden|0|0:h128drawn~'",
    f"requant e2m1:1x32:e8m0:quest|1|1:h32 as bf16 -> e2m1:1x32:e8m0:matched|0|0:h32drawn~{carrying(32)}'",
    "requant e4m3:128x128|1 as bf16 -> e4m3:1x128|0'",
    "requant int8:row|1 as f32 -> int8:row|0', e2m1:1x32:e8m0:up|1",
)
DECODES = (
    f"decode {NVFP4}|1",
    "decode e2m1:1x32:e8m0:up|0",
    "decode int4:1x32|1",
    "decode e4m3:1x128|1",
    "decode e5m2:1x32:e8m0:up|1",
    "decode e3m2:tensor|1",
)
LARGE = (
    (BF16 + "int8:tensor|1|1:h1024, e4m3:row|1|1:h1024', int8:row|1", (5, 1000)),
    (BF16 + "int8:tensor|1|0:h576drawn, e4m3:tensor|1|0:h28|1:h256fixed'", (560, 20)),
    (BF16 + "int8:tensor|1|1:h448, e2m1:1x32:e8m0:up|1|1:h60'", (20, 440)),
    (BF16 + "int8:tensor|1|1:h3584fixed", (3, 3500)),
    (BF16 + "int8:tensor|1|0:h3584", (3500, 5)),
    ("cast x0:bf16 x1:f32[r] = mul(x0, x1) as f32 -> keep, int8:tensor|1|1:h512drawn", (9, 500)),
    # The first pass finds the amax of the matrix as it is; behind a prologue that is computed first.
    (BF16 + "int8:tensor|1', int8:tensor|1|0:h576", (570, 24)),
    ("cast x0:bf16 x1:f32[r] = mul(x0, x1) as bf16 -> int8:tensor|1', int8:tensor|1|0:h576", (570, 24)),
)
RANDOM = {"seed": SEED, "uses": [2, 3, 4], "spins": [5, 6, 7, 8, 9, 10]}


def whole(shape: tuple[int, int], dtype: torch.dtype, broken: bool = False) -> torch.Tensor:
    x = torch.randint(-6, 7, shape, generator=torch.Generator().manual_seed(sum(shape))).float() / 8
    x[: shape[0] // 2, : shape[1] // 3] = 0.0
    if broken:
        x[0, 0], x[-1, -1] = float("nan"), float("inf")
    return x.to(dtype)


@pytest.mark.parametrize("text", TURNED)
def test_turned(text: str) -> None:
    dtype = parse(text).dtype
    for shape, broken, symbolic in (((37, 200), True, False), ((130, 257), False, True), ((128, 256), False, False)):
        check(*run(text, [whole(shape, dtype, broken)], symbolic=symbolic, **RANDOM))


@pytest.mark.parametrize(("text", "shape"), LARGE)
def test_too_large_for_a_tile(text: str, shape: tuple[int, int]) -> None:
    kernel = parse(text)
    powers = [torch.exp2(torch.arange(shape[0]) % 3).float() for _ in kernel.inputs[1:]]
    for symbolic in (False, True):
        check(*run(text, [whole(shape, torch.bfloat16, symbolic), *powers], symbolic=symbolic, **RANDOM))


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (BF16 + "int8:tensor|1|1:h1024drawn", (5, 1000)),
        (BF16 + "int8:tensor|1|1:h1024', int8:row|1|1:h1024fixed", (3, 2048)),
        (BF16 + "e4m3:tensor|1|0:h28|1:h512'", (56, 512)),
        # What a prologue computes is written first.
        ("cast x0:bf16 x1:f32[r] = mul(x0, x1) as bf16 -> int8:tensor|1|1:h3584fixed", (3, 3500)),
    ],
)
def test_rows_that_no_program_holds(text: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their widest strides have passes of their own."""
    monkeypatch.setattr(Target, "room", lambda *_: 256)
    powers = [torch.exp2(torch.arange(shape[0]) % 3).float() for _ in parse(text).inputs[1:]]
    for symbolic in (False, True):
        check(*run(text, [whole(shape, torch.bfloat16, symbolic), *powers], symbolic=symbolic, **RANDOM))


@pytest.mark.parametrize(
    ("text", "shape", "room"),
    [
        (BF16 + "int8:tensor|1|0:h576drawn", (560, 20), 256),
        ("cast x0:f32 = x0 as f32 -> int8:tensor|1|1:h448drawn'", (20, 440), 256),
        # The first pass finds the amax of the matrix as it is in the parts that it reads.
        (BF16 + "int8:tensor|1', int8:tensor|1|0:h576", (570, 24), 256),
        (BF16 + "int8:tensor|1|0:h40|1:h448fixed", (40, 448), 256),
        # With room for them a program keeps the parts.
        (BF16 + "int8:tensor|1', int8:tensor|1|0:h576fixed", (570, 24), 1 << 14),
    ],
)
def test_a_factors_matrix_read_in_parts(text: str, shape: tuple[int, int], room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "room", lambda *_: room)
    monkeypatch.setattr(in_memory, "_WHOLE", 16)
    monkeypatch.setattr(in_memory, "_PART", 16)
    for symbolic in (False, True):
        check(*run(text, [whole(shape, parse(text).dtype, symbolic)], symbolic=symbolic, **RANDOM))


def codes_of(text: str, shape: tuple[int, int]) -> tuple[list[torch.Tensor], int]:
    kernel = parse(text)
    assert isinstance(kernel, RequantKernel | DecodeKernel)
    parts = ops.quantize_reference(whole(shape, torch.bfloat16), str(kernel.source), SEED, 1, (2, 3))
    if isinstance(kernel, DecodeKernel):
        parts = parts[: 2 if folds(kernel.source.quant) else 1]
    return parts, int(kernel.source.turned(shape)[1])


@pytest.mark.parametrize("text", REQUANTS + DECODES)
def test_codes(text: str) -> None:
    for shape, symbolic in (((37, 200), False), ((130, 257), True)):
        parts, cols = codes_of(text, shape)
        check(*run(text, parts, [cols], symbolic=symbolic, **RANDOM))


def test_gaussian_sums_differ_by_one_step_at_most() -> None:
    """Sums of 32 in another order: a code may move to its neighbour where the sum lies on the edge between two."""
    text = BF16 + "int8:tensor|1|1:h32"
    (found, _), (expected, _) = run(text, [sample((64, 256))])
    apart = (found.int() - expected.int()).abs()
    assert int(apart.max()) <= 1 and int(apart.sum()) <= apart.numel() // 100
    assert int((found.int() - expected.int().roll(1)).abs().max()) > 1


@pytest.mark.parametrize(
    "output", ["e4m3:1x64|0|0:h64fixed", "e4m3:1x32:e8m0:up|0|0:h128drawn", f"{NVFP4}:eden|0|0:h128drawn~"]
)
def test_from_the_right_where_blocks_lie_along_the_turned_rows(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of Hopper and Blackwell: transposed, turned, transposed back. Signs make it matter which of the two it is."""
    inputs = [whole((130, 130), torch.bfloat16, broken="eden" not in output)]
    for targets in (("sm_90",), ("interpret",)):
        monkeypatch.setattr(turn, "_BY_ROWS", targets)
        check(*run(BF16 + output, inputs, **RANDOM))


def test_values_of_ms_eden_that_are_not_finite() -> None:
    """Their scales are no numbers, so that whatever codes they multiply is none either."""
    found, wanted = run(f"{BF16}{NVFP4}:eden|0|0:h128drawn~", [whole((130, 130), torch.bfloat16, broken=True)], **RANDOM)
    assert all(torch.equal(bits(each), bits(other)) for each, other in zip(found, wanted, strict=True))
    assert found[0].isnan().all() and found[1].isnan().all()
    found, _ = run(f"{BF16}{NVFP4}:eden|0|0:h128drawn~", [whole((130, 130), torch.bfloat16)], **RANDOM)
    assert found[0].isfinite().all()
