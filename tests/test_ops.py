"""The operators: opcheck (schema, fakes, symbolic shapes), and the CPU implementations against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import lpcompile as lp
from lpcompile.ops import REFERENCE, sqnr
from lpcompile.recipe import Cast

LOWPREC = torch.ops.lowprec
SEED = torch.tensor([12345])
QUEST = "e2m1:1x32:e8m0:quest|1|1:h32"
CASTS = ["e4m3:row:up|0", "e4m3:1x128|1", "int8:row|1", "e2m1:1x16:e4m3+f32|0", "e2m1:1x32:e8m0:quest|1", "e4m3:128x128|1"]
PAIRS = [
    "e4m3:tensor|1 @ e5m2:tensor|1'",
    "e4m3:1x128|1 @ e4m3:128x128|1'",
    "e4m3:1x32:e8m0:up|1 @ e4m3:1x32:e8m0:up|0",
    "int8:row|0' @ int8:row|0",
    "int4:row|1 @ int4:row|1'",
    "e2m1:1x16:e4m3+f32|1 @ e2m1:16x16:e4m3+f32|1'",
    "e2m1:1x32:e8m0:matched|0' @ e2m1:1x32:e8m0:quest|1'",
    "hp @ int8:row|1'",
    "e3m2:tensor|1 @ hp",
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """The compiled kernels of one test serve the next: they are the operators' own, and nothing else is compiled here."""
    torch.manual_seed(0)


# torch's own schema check multiplies its inputs, which CPU tensors of float8 cannot do.
NO_SCHEMA = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def checks(parts: list[Tensor]) -> tuple[str, ...]:
    eight_bit_floats = any(p.dtype.is_floating_point and p.element_size() == 1 for p in parts)
    return NO_SCHEMA if eight_bit_floats else ("test_schema", *NO_SCHEMA)


def operands(dot: str, m: int, n: int, k: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Parts of both sides and the exact product of what they decode to, in float64."""
    sides, values = [], []
    for index, text in enumerate(dot.split(" @ ")):
        transposed = text.endswith("'")
        shape = (m, k) if index == 0 else (k, n)
        value = torch.randn(shape[::-1] if transposed else shape).to(dtype)
        cast = text.removesuffix("'")
        parts = [value] if cast == "hp" else REFERENCE["quantize"](value, cast)
        decoded = value if cast == "hp" else REFERENCE["dequantize"](parts, cast, value.shape[1], torch.float32)
        sides.append(parts)
        values.append(decoded.double().mT if transposed else decoded.double())
    return sides[0], sides[1], values[0] @ values[1]


def test_opcheck_quantize() -> None:
    for cast in CASTS:
        opcheck(LOWPREC.quantize.default, (torch.randn(48, 40), cast))
        opcheck(LOWPREC.quantize.default, (torch.randn(2, 33, 31).bfloat16(), cast))


def test_opcheck_dequantize() -> None:
    for cast in CASTS:
        parts = REFERENCE["quantize"](torch.randn(48, 40), cast)
        opcheck(LOWPREC.dequantize.default, (parts, cast, 40, torch.bfloat16), test_utils=checks(parts))


@pytest.mark.parametrize("dot", PAIRS)
def test_opcheck_scaled_mm(dot: str) -> None:
    left, right, _ = operands(dot, 34, 48, 40, torch.float32)
    for bias, dtype in ((None, torch.float32), (torch.randn(48), torch.bfloat16)):
        arguments = (left, right, bias, dot, [34, 48], dtype)
        opcheck(LOWPREC.scaled_mm.default, arguments, test_utils=checks(left + right))


def test_opcheck_hadamard() -> None:
    opcheck(LOWPREC.hadamard.default, (torch.randn(32, 70), 1, "h16"))
    opcheck(LOWPREC.hadamard.default, (torch.randn(32, 64).bfloat16(), 0, "h32drawn", 30, SEED, 3))


def test_opcheck_requantize_and_mask() -> None:
    parts = LOWPREC.quantize(torch.randn(32, 96), QUEST)
    opcheck(
        LOWPREC.requantize.default, (parts, QUEST, "e2m1:1x32:e8m0:matched:sr|0|0:h32drawn", 96, torch.float32, SEED, 1, [2, 0])
    )
    opcheck(LOWPREC.apply_mask.default, (torch.randn(32, 96), parts[-1], False))
    opcheck(LOWPREC.apply_mask.default, (torch.randn(96, 32).bfloat16(), parts[-1], True))


def test_requantize_starts_from_what_the_codes_stand_for() -> None:
    """In the rotation that they are in; the compiled form gives the same bits."""
    x = torch.randn(96, 160)
    parts = LOWPREC.quantize(x, QUEST)
    decoded = REFERENCE["dequantize"](parts, QUEST, 160, torch.bfloat16)
    cast = "e2m1:1x32:e8m0:matched|0|0:h32drawn"
    wanted = REFERENCE["quantize"](decoded, cast, SEED, 4, [7, 0])
    for implementation in (REFERENCE["requantize"], LOWPREC.requantize):
        found = implementation(parts, QUEST, cast, 160, torch.bfloat16, SEED, 4, [7, 0])
        assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
        assert not torch.equal(found[0], implementation(parts, QUEST, cast, 160, torch.bfloat16, SEED, 4, [8, 0])[0])


def test_mask_keeps_what_was_not_clipped() -> None:
    x = torch.randn(96, 160) * torch.randn(96, 1).exp()
    x[3, 5], x[90, 159] = 100.0, -100.0
    bits = LOWPREC.quantize(x, "e2m1:1x32:e8m0:quest|1")[-1]
    gradient = torch.randn(96, 160)
    for implementation in (REFERENCE["apply_mask"], LOWPREC.apply_mask):
        masked = implementation(gradient, bits, False)
        assert masked[3, 5] == 0
        assert masked[90, 159] == 0
        assert (masked == gradient).float().mean() > 0.9
        assert torch.equal(implementation(gradient.T, bits, True), masked.T)


def test_hadamard_is_orthonormal() -> None:
    x = torch.randn(30, 70)
    for axis, padded in ((0, (32, 70)), (1, (30, 80))):
        turned = LOWPREC.hadamard(x, axis, "h16drawn", None, SEED, 2)
        assert turned.shape == padded
        back = LOWPREC.hadamard(turned, axis, "h16drawn", x.shape[axis], SEED, 2)
        torch.testing.assert_close(back, x, atol=1e-5, rtol=0)
        assert (LOWPREC.hadamard(turned, axis, "h16drawn", x.shape[axis], SEED, 1) - x).norm() > 1.0
        assert (turned[:30, :70] - x).norm() > 1.0
        torch.testing.assert_close(turned.norm(), x.norm())


@pytest.mark.parametrize("shape", [(34, 48, 40), (129, 65, 257), (128, 256, 512)], ids=str)
@pytest.mark.parametrize("dot", PAIRS)
def test_scaled_mm_equals_the_product_of_what_is_stored(dot: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    left, right, exact = operands(dot, m, n, k, torch.float32)
    bias = torch.randn(n)
    wanted = exact + bias.double()
    for implementation in (REFERENCE["scaled_mm"], LOWPREC.scaled_mm):
        found = implementation(left, right, bias, dot, [m, n], torch.float32)
        assert (found.double() - wanted).norm() / wanted.norm() < 2e-6
        assert (found.double() - wanted.flip(0)).norm() / wanted.norm() > 0.5


def test_integer_products_are_exact() -> None:
    """Sums far beyond FP32's 24 bits: the integer accumulation must not round (halo oracle 8.7)."""
    codes = torch.randint(-127, 128, (64, 4096), dtype=torch.int8)
    other = torch.randint(-127, 128, (48, 4096), dtype=torch.int8)
    codes[:, 0] = other[:, 0] = 127
    dot = "int8:row|1 @ int8:row|1'"
    ones_m, ones_n = torch.ones(64, 1), torch.ones(48, 1)
    wanted = (codes.double() @ other.double().T).float()
    for implementation in (REFERENCE["scaled_mm"], LOWPREC.scaled_mm):
        assert torch.equal(implementation([codes, ones_m], [other, ones_n], None, dot, None, torch.float32), wanted)


@pytest.mark.parametrize("instruction", [True, False])
def test_byte_products_are_exact_with_an_instruction_and_without(instruction: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: instruction)
    a, b = (torch.full((4, 1 << 12), sign * 127, dtype=torch.int8) for sign in (1, -1))
    a[0, 0] = 126
    dot, one = "int8:tensor|1 @ int8:tensor|1'", torch.ones(1, 1)
    found = LOWPREC.scaled_mm([a, one], [b, one], None, dot, None, torch.float32)
    assert torch.equal(found, (a.long() @ b.long().T).float()) and found[0, 0] != found[1, 0]


def test_products_of_many_forms_in_one_process() -> None:
    """More than the eight for which Dynamo compiles one function before it gives up."""
    codes, scales = torch.randint(-127, 128, (2, 80, 64), dtype=torch.int8), torch.rand(2, 80, 1) + 0.5
    product, bias = codes[0].double() @ codes[1].double().T, torch.randn(80)
    for rows in ((True, True), (True, False), (False, True)):
        dot = " @ ".join("int8:row|1" if row else "int8:tensor|1" for row in rows) + "'"
        given = [(c, s if row else s[:1]) for c, s, row in zip(codes, scales, rows, strict=True)]
        for added, dtype in ((None, torch.float32), (bias, torch.float32), (bias, torch.bfloat16)):
            wanted = product * given[0][1] * given[1][1].T + (0.0 if added is None else added)
            found = LOWPREC.scaled_mm(*map(list, given), added, dot, None, dtype)
            assert (found - wanted).norm() / wanted.norm() < (1e-6 if dtype == torch.float32 else 2.0**-8), (dot, dtype)


def test_bfloat16_results_are_within_one_unit() -> None:
    for dot in PAIRS:
        left, right, exact = operands(dot, 129, 66, 256, torch.bfloat16)
        found = LOWPREC.scaled_mm(left, right, None, dot, [129, 66], torch.bfloat16)
        assert found.dtype == torch.bfloat16
        assert (found.double() - exact).norm() / exact.norm() < 2.0**-8, dot


def test_batched_operands_equal_a_loop() -> None:
    x, w = torch.randn(3, 40, 64), torch.randn(3, 48, 64)
    for text in ("e4m3:row:up", "e4m3:tensor", "e2m1:1x16:e4m3+f32", "int8:row"):
        dot = f"{Cast.parse(text + '|1')} @ {Cast.parse(text + '|1')}'"
        cast = str(Cast.parse(f"{text}|1"))
        found = LOWPREC.scaled_mm(LOWPREC.quantize(x, cast), LOWPREC.quantize(w, cast), None, dot, None, torch.float32)
        for index in range(3):
            a, b = LOWPREC.quantize(x[index], cast), LOWPREC.quantize(w[index], cast)
            torch.testing.assert_close(found[index], LOWPREC.scaled_mm(a, b, None, dot, None, torch.float32))
        assert not torch.allclose(found[0], found[1])


def test_empty_tensors() -> None:
    for cast in CASTS:
        for shape in ((0, 64), (64, 0)):
            found = LOWPREC.quantize(torch.randn(shape), cast)
            fake = torch.ops.lowprec.quantize(torch.empty(shape, device="meta"), cast)
            assert [f.shape for f in found] == [f.shape for f in fake]
    dot = "e4m3:row:up|1 @ e4m3:row:up|1'"
    empty, full = (LOWPREC.quantize(torch.randn(s), "e4m3:row:up|1") for s in ((0, 64), (48, 64)))
    assert LOWPREC.scaled_mm(empty, full, torch.ones(48), dot, None, torch.float32).shape == (0, 48)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_reach_the_output(bad: float) -> None:
    x, w = torch.randn(64, 256), torch.randn(96, 256)
    x[5, 17] = bad
    for text in ("e4m3:row:up", "e4m3:tensor", "int8:row", "e4m3:1x128", "e4m3:1x32:e8m0:up", "e2m1:1x16:e4m3+f32"):
        cast = str(Cast.parse(f"{text}|1"))
        for quantize, mm in ((LOWPREC.quantize, LOWPREC.scaled_mm), (REFERENCE["quantize"], REFERENCE["scaled_mm"])):
            out = mm(quantize(x, cast), quantize(w, cast), None, f"{cast} @ {cast}'", None, torch.float32)
            assert out[5].isnan().all(), text
            if "tensor" not in text and "+f32" not in text:
                assert out[:5].isfinite().all() and out[6:].isfinite().all(), text


def test_bad_input_is_named() -> None:
    with pytest.raises(lp.FormatError, match=r"torch\.int64"):
        REFERENCE["quantize"](torch.zeros(4, 4, dtype=torch.int64), "int8:row|1")
    with pytest.raises(lp.FormatError, match="no such float: 9 exponent"):
        LOWPREC.quantize(torch.randn(4, 4), "e9m9:row|1")
    with pytest.raises(lp.RecipeError, match="'int8:row'"):
        LOWPREC.quantize(torch.randn(4, 4), "int8:row")


def test_sqnr_of_a_cast() -> None:
    x = torch.randn(256, 256)
    found = sqnr(x, LOWPREC.quantize(x, "int8:row|1"), "int8:row|1")
    decoded = REFERENCE["dequantize"](LOWPREC.quantize(x, "int8:row|1"), "int8:row|1", 256, torch.float32)
    assert found == pytest.approx(10 * torch.log10(x.square().sum() / (x - decoded).square().sum()).item(), abs=1e-3)
    assert 35 < found < 50
