"""Averages over many steps: what stochastic rounding and drawn signs are for (quartet 7.4 and 10, nvfp4 6.9)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lpcompile import ops
from lpcompile.formats import Quant
from lpcompile.hadamard import rotation_matrix
from lpcompile.ops import REFERENCE, turn
from lpcompile.recipe import Cast, Signs

AXIS = "|1"
MATCHED = "e2m1:1x32:e8m0:matched"
NVFP4 = "e2m1:1x16:e4m3+f32"


def restored(x: Tensor, cast: str, seed: int, use: int, spin: int = 0) -> Tensor:
    """What the codes of `x` stand for, still turned."""
    parts = REFERENCE["quantize"](x, cast, torch.tensor([seed]), use, (spin, spin))
    cols = Cast.parse(cast).turned(x.shape)[-1]
    found: Tensor = REFERENCE["dequantize"](parts, cast, cols, torch.float32)
    return found


def bits(found: Tensor, wanted: Tensor) -> float:
    """-1/2 log2 of the relative squared error."""
    return -0.5 * math.log2(float((found.double() - wanted.double()).square().sum() / wanted.double().square().sum()))


def gaussian_lognormal(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, 256, generator=generator) * torch.exp(0.8 * torch.randn(64, 256, generator=generator))


def accumulated(cast: str, steps: tuple[int, ...], wrong_side: bool = False) -> list[float]:
    """Bits of the mean of T backward-quantised products A B^T, for each T."""
    a, b = gaussian_lognormal(1), gaussian_lognormal(2)
    if wrong_side:
        # x H D in place of x D H: the signs come after the rotation and change nothing.
        h = torch.block_diag(*[rotation_matrix(32)] * 8)
        a, b, cast = a @ h, b @ h, cast.partition("|1:")[0]
    exact, total, found = a.double() @ b.double().T, torch.zeros(64, 64, dtype=torch.float64), []
    for step in range(1, max(steps) + 1):
        total += restored(a, cast, step, 0, 5).double() @ restored(b, cast, step, 1, 5).double().T
        if step in steps:
            found.append(bits(total / step, exact))
    return found


def test_mxfp4_backward_products() -> None:
    """quartet section 7.4: separates true random rotations and unbiased rounding from what only looks like them."""
    steps = (1, 4, 16, 64, 256)
    turned, plain = f"{AXIS}|1:h32drawn", AXIS
    nearest = accumulated(MATCHED + turned, steps)
    stochastic = accumulated(MATCHED + ":sr" + turned, steps)
    assert nearest == pytest.approx([2.59, 3.61, 4.52, 5.18, 5.56], abs=0.25)
    assert stochastic == pytest.approx([2.09, 3.11, 4.11, 5.14, 6.13], abs=0.25)
    assert accumulated(MATCHED + ":sr" + plain, steps[:3]) == pytest.approx([1.87, 2.84, 3.87], abs=0.25)
    # Unbiased: 1 bit for each fourfold; rounding to nearest keeps up until its bias shows.
    assert all(later - earlier >= 0.9 for earlier, later in itertools.pairwise(stochastic))
    assert all(later - earlier >= 0.85 for earlier, later in itertools.pairwise(nearest[:3]))
    assert all(nearest[i + 1] - nearest[i] < stochastic[i + 1] - stochastic[i] for i in (2, 3))
    for wrong in (accumulated(MATCHED + plain, (1, 8)), accumulated(MATCHED + turned, (1, 8), wrong_side=True)):
        assert wrong[0] == pytest.approx(wrong[1], abs=1e-9)
        assert wrong[0] == pytest.approx(2.5, abs=0.25)


def signs_behind(x: Tensor, cast: Cast, seed: Tensor | None, spins: tuple[int, int]) -> Tensor:
    """`ops.turn` with the signs on the wrong side: x H D in place of x D H. It still cancels in the product."""
    plain = tuple(None if r is None else replace(r, signs=Signs.NONE) for r in cast.rotations)
    turned = turn(x, replace(cast, rotations=plain), None, (0, 0))
    for axis, rotation in enumerate(cast.rotations):
        if rotation is not None and rotation.signs is Signs.DRAWN:
            signs = ops._signs(rotation, seed, spins[axis], x.device).repeat(turned.shape[axis] // rotation.block)
            turned = turned * (signs if axis == 1 else signs[:, None])
    return turned


def gradient_bits(recipe: str, steps: tuple[int, ...]) -> list[float]:
    """Bits of the mean of T weight gradients of a compiled layer, beside what its backward product estimates."""
    torch.compiler.reset()
    x, dy = gaussian_lognormal(1).T.contiguous(), gaussian_lognormal(2).T.contiguous()  # 256 tokens
    layer = nn.Linear(64, 64, bias=False)
    forward, seed = "e2m1:1x32:e8m0:quest|1|1:h32", torch.zeros(1, dtype=torch.int64)
    weight = REFERENCE["quantize"](layer.weight.detach(), forward)
    product = dy.double().T @ restored(x, forward, 0, 0).double()
    exact = REFERENCE["hadamard"](REFERENCE["apply_mask"](product, weight[-1], False), 1, "h32", 64, seed, 0)
    model = torch.compile(layer, backend="lowprec", options={"recipe": recipe, "executor": "reference", "always": True})
    total, found = torch.zeros(64, 64, dtype=torch.float64), []
    for step in range(1, max(steps) + 1):
        layer.zero_grad()
        model(x).backward(dy)
        assert layer.weight.grad is not None
        total += layer.weight.grad
        if step in steps:
            found.append(bits(total / step, exact))
    return found


@pytest.mark.parametrize("recipe", ["quartet", "quartet-sr"])
def test_the_gradients_of_a_compiled_layer_average_out(recipe: str) -> None:
    """The same through the whole of a recipe: dW from the codes of fprop, masked, and turned back."""
    found = gradient_bits(recipe, (1, 4, 16))
    assert found[0] > 1.7
    assert all(later - earlier >= 0.8 for earlier, later in itertools.pairwise(found))


def test_signs_on_the_wrong_side_do_not_average_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate that a broken recipe fails: its single gradients look as good, but each step makes the same error."""
    monkeypatch.setattr(ops, "turn", signs_behind)
    found = gradient_bits("quartet", (1, 4, 16))
    assert found[0] > 1.7
    assert found[2] - found[0] < 1e-3


def averaged(quant: str, steps: tuple[int, ...]) -> list[float]:
    """Bits of the mean of T quantisations of one Gaussian tensor, turned back."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    rotation = rotation_matrix(128)
    cast = f"{quant}|1|1:h128drawn"
    total, found = torch.zeros_like(x), []
    signs = torch.ones(1, 128)
    for step in range(1, max(steps) + 1):
        seed = torch.tensor([step])
        # The signs as the op draws them: the first row of a turned identity is a turned one-hot.
        turned = turn(torch.eye(128), Cast.parse(cast), seed, (0, 0))
        signs = torch.sign(turned @ rotation.T).diagonal().unsqueeze(0)
        back = restored(x, cast, step, 0).unflatten(-1, (-1, 128)) @ rotation.T * signs
        total += back.flatten(-2)
        if step in steps:
            found.append(bits(total / step, x))
    return found


def test_ms_eden_averages_like_unbiased_rounding_with_a_smaller_error() -> None:
    """quartet section 10: 3.31 / 4.34 / 5.35 / 6.34 bits at 1 / 4 / 16 / 64 draws."""
    steps = (1, 4, 16, 64)
    eden, nearest = averaged(NVFP4 + ":eden", steps), averaged(NVFP4, steps)
    assert eden == pytest.approx([3.31, 4.34, 5.35, 6.34], abs=0.06)
    assert nearest == pytest.approx([3.39, 4.39, 5.35, 6.30], abs=0.06)
    assert all(later - earlier >= 0.95 for earlier, later in itertools.pairwise(eden))
    headroom = averaged(NVFP4 + ":sr:clip=1.0625", steps[:3])
    assert headroom == pytest.approx([2.74, 3.69, 4.71], abs=0.08)


def test_ms_eden_error_on_gaussian_data() -> None:
    """quartet section 10: 9.7e-3, beside 9.04e-3 to nearest and 23.5e-3 unbiased."""
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(4))
    error = {
        quant: float((restored(x, quant + AXIS, 1, 0) - x).square().mean() / x.square().mean())
        for quant in (NVFP4, NVFP4 + ":eden", NVFP4 + ":sr:clip=1.0625", NVFP4 + ":4over6")
    }
    assert list(error.values()) == pytest.approx([9.04e-3, 9.7e-3, 23.5e-3, 7.6e-3], rel=0.02)


def test_ms_eden_scales_are_neighbours_and_codes_nearest() -> None:
    """Only the scales are random: codes are those of another draw, scales one of two E4M3 neighbours."""
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(5))
    quant = Quant.parse(NVFP4 + ":eden")
    draws = [REFERENCE["quantize"](x, f"{quant}|1", torch.tensor([seed]), 0) for seed in range(40)]
    assert all(torch.equal(d[0], draws[0][0]) and torch.equal(d[2], draws[0][2]) for d in draws)
    scales = torch.stack([d[1].view(torch.uint8).int() for d in draws])
    low, high = scales.amin(0), scales.amax(0)
    assert (high - low <= 1).all()
    assert (high - low).float().mean() > 0.5
    zero = REFERENCE["quantize"](torch.zeros(4, 128), f"{quant}|1", torch.tensor([1]), 0)
    assert not zero[0].any()
    poisoned = x.clone()
    poisoned[3, 7] = math.nan
    assert (
        REFERENCE["dequantize"](
            REFERENCE["quantize"](poisoned, f"{quant}|1", torch.tensor([1]), 0), f"{quant}|1", 256, torch.float32
        )
        .isnan()
        .all()
    )
