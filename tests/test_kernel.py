"""Kernels as values: the text form parses back, what cannot be is refused, a prologue means what PyTorch means."""

from __future__ import annotations

import pytest
import torch

from lpcompile.errors import KernelError, RecipeError
from lpcompile.expr import Load, call, evaluate, parse_expr
from lpcompile.kernel import CastKernel, DecodeKernel, GemmKernel, RequantKernel, parse

TEXTS = (
    "cast x0:bf16 = x0 as bf16 -> e4m3:1x128|1",
    "cast x0:bf16 x1:f32[c] = mul(x0, x1) as bf16 -> keep, e4m3:1x128|1, e4m3:1x128|0|0:h16fixed'",
    "cast x0:f32 x1:f32[r] = add(mul(x0, x1), -1e-05) as f32 -> e2m1:1x16:e4m3+f32|1#",
    "cast x0:bf16 x1:f32[r] x2:bf16 = mul(x0, x1); silu(x2) as bf16 -> e4m3:row:up|1, e4m3:row:up|0'; e4m3:row:up|1",
    "requant e2m1:1x32:e8m0:quest|1|1:h32 as bf16 -> e2m1:1x32:e8m0:matched|0|0:h32drawn'",
    "gemm e4m3:1x128|1 @ e4m3:128x128|1' -> bf16 + bias",
    "gemm hp @ int8:row|0 -> f32",
    "decode e2m1:1x16:e4m3+f32|0|0:h16fixed",
    "cast x0:bf16 = x0 as bf16 -> e2m1:1x16:e4m3+f32|1~, e2m1:1x16:e4m3+f32:sr|0|0:h16fixed~'",
    "gemm e2m1:1x32:e8m0:up|1~ @ e2m1:1x32:e8m0:up|1~' -> bf16 then add(x0, mul(x1, x2)) as f32 with x1:bf16 x2:f32[c]",
    "gemm e2m1:1x32:e8m0:up|1 @ e2m1:1x32:e8m0:up|1' -> bf16 + bias * mask' * 0:h16fixed * 1:h32",
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_parses_back(text: str) -> None:
    kernel = parse(text)
    assert str(kernel) == text
    assert parse(str(kernel)) == kernel and hash(parse(str(kernel))) == hash(kernel)
    assert (
        type(kernel)
        is {
            "cast": CastKernel,
            "requant": RequantKernel,
            "decode": DecodeKernel,
            "gemm": GemmKernel,
        }[text.split(maxsplit=1)[0]]
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("cats x0:bf16 = x0 as bf16 -> e4m3:row|1", "Did you mean 'cast'"),
        ("cast x0:bf16 = silo(x0) as bf16 -> e4m3:row|1", "Did you mean 'silu'"),
        ("cast x0:bf16 = mul(x0) as bf16 -> e4m3:row|1", "2 arguments"),
        ("cast x0:bf16 = mul(x0, as bf16 -> e4m3:row|1", "ends too early"),
        ("cast x0:bf16 = silu as bf16 -> e4m3:row|1", "parentheses"),
        ("cast x0:bf16 = x0) as bf16 -> e4m3:row|1", "nothing may follow"),
        ("cast x0:bf16 x1:bf16 = x0 as bf16 -> e4m3:row|1", "reads inputs [0] of 2"),
        ("cast x0:bf16[c] = x0 as bf16 -> e4m3:row|1", "first input"),
        ("cast x0:f64 = x0 as bf16 -> e4m3:row|1", "'f64' is no dtype"),
        ("cast x0:bf16 = x0 as bf16 -> keep", "at least one"),
        ("cast x0:bf16 = x0 as bf16 -> e4m3:row|1#", "tiles of scales"),
        ("cast x0:bf16 = x0 as bf16 -> e4m3:1x32|0#", "tiles of scales"),
        ("cast x0:bf16 x1:bf16 = x0; x1 as bf16 -> e4m3:row|1", "2 prologues"),
        ("cast x0:bf16 = x0 as bf16 -> e4m3:row|1; e4m3:row|1", "1 prologues"),
        ("cast x0:bf16 = x0; neg(x0); abs(x0) as bf16 -> e4m3:row|1; e4m3:row|1; e4m3:row|1", "one prologue, or two"),
        ("cast x0:bf16 = neg(x0); abs(x0) as bf16 -> keep, e4m3:row|1; e4m3:row|1", "keeps no result"),
        ("cast x0:bf16 x1:f32[c] = x0; x1 as bf16 -> e4m3:row|1; e4m3:row|1", "x1 reads no matrix"),
        ("requant e4m3:row|1 as bf16 -> e4m3:row|1; e4m3:row|1", "one matrix"),
        ("cast x0:bf16 = x0 as bf16 -> e4m3:row|1, ", "is not a cast"),
        ("cast x0:bf16 x1:bf16 = x0; x1 as bf16 -> e4m3:row|1; ", "is not a cast"),
        ("requant e4m3:row|1 -> e4m3:row|1", "no requant kernel"),
        ("gemm hp @ hp", "no gemm kernel"),
        ("gemm hp~ @ hp -> bf16", "nothing to decode"),
        ("gemm hp @ hp -> bf16 then add(x0, x1) as bf16", "reads [0, 1]"),
        ("cast x0:bf16 = x0 as bf16 -> e2m1:1x32:e8m0:up|1~#", "scales in tiles"),
    ],
)
def test_what_cannot_be_is_refused(text: str, part: str) -> None:
    with pytest.raises((KernelError, RecipeError)) as caught:
        parse(text)
    assert part in str(caught.value)


def test_prologue_means_what_pytorch_means() -> None:
    x, w, b = torch.randn(5, 24), torch.randn(24), torch.randn(24)
    functional = torch.nn.functional
    cases = {
        call("mul", call("mul", Load(0), call("rsqrt", call("abs", Load(2)))), Load(1)): x * b.abs().rsqrt() * w,
        call("mul", call("silu", Load(0)), Load(1)): functional.silu(x) * w,
        call("gelu", call("sub", Load(0), Load(2))): functional.gelu(x - b),
        call("bf16", call("div", Load(0), 3.0)): (x / 3).bfloat16().float(),
    }
    for expr, wanted in cases.items():
        assert parse_expr(str(expr)) == expr
        found = evaluate(expr, (x, w, b))
        # A few FP32 roundings of values of size 1.
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(found.flip(0), wanted, atol=1e-3)
