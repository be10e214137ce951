"""The operators by generated kernels, dispatched as on a GPU: what is generated, looked up, refused, fallen back from."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from lpcompile import ops
from lpcompile.codegen import launch, tune
from lpcompile.codegen.example import example, mismatch
from lpcompile.codegen.source import Schedule
from lpcompile.fused import fused_reference
from lpcompile.kernel import parse

GEMM = "gemm e4m3:row|1 @ e4m3:row|1' -> bf16 + bias"


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    launch.install()
    monkeypatch.setattr(launch, "_LAUNCHES", {})
    monkeypatch.setattr(launch, "_SHAPES", {})
    monkeypatch.setattr(launch, "FALLBACKS", {})


def fused(call):
    return torch.ops.lowprec.fused(call.inputs, str(call.kernel), call.sizes, call.seed, call.uses, call.spins)


def test_an_operator_runs_the_generated_kernel():
    call = example(parse(GEMM), (48, 40, 64))
    found = fused(call)
    assert mismatch(call.kernel, found, call.reference()) is None
    assert mismatch(call.kernel, [found[0].roll(1, 0)], call.reference()) is not None
    assert mismatch(call.kernel, [found[0] * 0], call.reference()) is not None
    assert len(launch._LAUNCHES) == 1 and not launch.FALLBACKS
    fused(call)
    assert len(launch._LAUNCHES) == 1
    chosen = tune.winner(GEMM, (48, 40, 64))
    assert chosen is not None and chosen.times == {}
    assert tune.winner(GEMM, (48, 40, 65)) is None
    launch.install()


def test_compiled_code_calls_the_launch_itself(monkeypatch):
    """Neither through the dispatcher nor with assertions on what was just allocated; eager calls take the operator."""
    text, x = "cast x0:bf16 = x0 as bf16 -> e4m3:row:up|1, e4m3:row:up|0'", torch.randn(40, 96).to(torch.bfloat16)
    calls = []

    def counted(*args, **named):
        calls.append(args)
        return launch.run(*args, **named)

    monkeypatch.setattr(torch.ops.lowprec, "launch", counted)
    with config.patch(force_disable_caches=True):
        found, (code,) = run_and_get_code(torch.compile(lambda x: torch.ops.lowprec.fused([x * 2], text)), x)
    expected = fused_reference([x * 2], text)
    assert len(calls) == 1 and all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0].float(), torch.ops.lowprec.fused([x], text)[0].float().roll(1, 0)) and len(calls) == 1
    assert "torch.ops.lowprec.launch([buf0]" in code and "assert_size_stride(buf" not in code


def test_the_unfused_operators_are_kernels_too():
    """Their implementations for a GPU, on CPU tensors."""
    x, w = torch.randn(40, 96).to(torch.bfloat16), torch.randn(64, 96).to(torch.bfloat16)
    cast, other, seed = "e2m1:1x32:e8m0:up:sr|1", "e2m1:1x32:e8m0:matched|0|0:h32drawn", torch.tensor([3])
    parts = launch._quantize(x, cast, seed, 5)
    expected = ops.quantize_reference(x, cast, seed, 5)
    assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))
    assert not torch.equal(parts[0], ops.quantize_reference(x, cast, seed, 6)[0])
    again = launch._requantize(parts, cast, other, 96, torch.bfloat16, seed, 0, (1, 2))
    expected = ops.requantize_reference(parts, cast, other, 96, torch.bfloat16, seed, 0, (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    decoded = launch._dequantize(parts, cast, 96, torch.bfloat16)
    assert torch.equal(decoded, ops.dequantize_reference(parts, cast, 96, torch.bfloat16)) and decoded.any()
    left, right = (ops.quantize_reference(each, "e4m3:row|1") for each in (x, w))
    dot, bias = "e4m3:row|1 @ e4m3:row|1'", torch.randn(64).to(torch.bfloat16)
    found = launch._scaled_mm(left, right, bias, dot, None, torch.bfloat16)
    expected = [ops.scaled_mm_reference(left, right, bias, dot, None, torch.bfloat16)]
    assert mismatch(parse(GEMM), [found], expected) is None
    assert len(launch._LAUNCHES) == 4 and not launch.FALLBACKS


def test_what_no_kernel_means_runs_as_the_reference():
    x = torch.randn(2, 8, 32)
    assert torch.equal(launch._quantize(x, "int8:row|1")[0], ops.quantize_reference(x, "int8:row|1")[0])
    parts = ops.quantize_reference(x[0], "int8:row|1")
    assert torch.equal(
        launch._dequantize(parts, "int8:row|1", 32, torch.float32),
        ops.dequantize_reference(parts, "int8:row|1", 32, torch.float32),
    )
    assert not launch._LAUNCHES


def test_strided_inputs():
    call = example(parse(GEMM), (48, 40, 64))
    strided = [x.mT.contiguous().mT if x.dim() == 2 else x for x in call.inputs]
    assert not strided[0].is_contiguous()
    found = torch.ops.lowprec.fused(strided, GEMM, call.sizes)
    assert torch.equal(found[0], fused(call)[0])
    assert len(launch._LAUNCHES) == 2


def test_many_sizes_share_a_module(monkeypatch):
    seen = []
    emit = launch.emit
    monkeypatch.setattr(launch, "emit", lambda kernel, sizes, *rest: seen.append(str(sizes)) or emit(kernel, sizes, *rest))
    monkeypatch.setattr(launch, "_MANY", 2)
    for m in (16, 32, 48, 80):
        call = example(parse(GEMM), (m, 32, 32))
        assert mismatch(call.kernel, fused(call), call.reference()) is None
    assert len(set(seen)) == 3 and "s0" in seen[-1]


def test_what_cannot_be_generated_runs_as_the_reference_and_says_so_once():
    text = "cast x0:bf16 = x0 as bf16 -> e4m3:1x128|1"
    x = torch.randn(2, 4, 128, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"runs as plain PyTorch, slowly: kernels read matrices, not .* \(2, 4, 128\)"):
        found = torch.ops.lowprec.fused([x], text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.ops.lowprec.fused([x[:1]], text)
    for a, b in zip(found, fused_reference([x], text), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert list(launch.FALLBACKS) == [text]
    (empty,) = torch.ops.lowprec.fused([torch.empty(0, 8, dtype=torch.int8)], "decode int8:row|1", [8])
    assert empty.shape == (0, 8)


def test_a_wrong_kernel_is_disabled(monkeypatch):
    monkeypatch.setattr(tune, "fault", lambda *_: "3.0% of 64 elements are right")
    call = example(parse(GEMM), (16, 16, 16))
    with pytest.warns(UserWarning, match=r"runs as plain PyTorch, slowly: its self-test on \w+ failed \(3.0%"):
        found = fused(call)
    assert torch.equal(found[0], call.reference()[0])


def test_the_next_schedule_stands_in_for_a_wrong_one(monkeypatch):
    wrong, right = Schedule((16, 16, 32), 4, 2), Schedule((32, 32, 32), 4, 2)
    monkeypatch.setattr(tune, "schedules", lambda *_: (wrong, right))
    monkeypatch.setattr(tune, "fault", lambda *given: "3.0% of 64 elements are right" if given[3] == wrong else None)
    call = example(parse(GEMM), (16, 32, 32))
    with pytest.warns(UserWarning, match=r"16x16x32.* failed its self-test on interpret: 3.0%"):
        found = fused(call)
    assert mismatch(call.kernel, found, call.reference()) is None and not launch.FALLBACKS
    chosen = tune.winner(GEMM, (16, 32, 32))
    assert chosen is not None and chosen.schedule == str(right)
