"""Kernels that Inductor sees: its generated code holds them, on a machine without a GPU."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
import torch._inductor.scheduler
import triton.runtime
from torch._inductor import config, lowering
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget

from lpcompile.codegen import direct, emit, launch, reveal
from lpcompile.codegen.example import example
from lpcompile.codegen.source import Schedule, Sizes
from lpcompile.kernel import parse
from lpcompile.target import find_target

CAST = "cast x0:bf16 = x0 as bf16 -> e4m3:row:up|1, e4m3:row:up|0'"
GEMM = "gemm e4m3:row|1 @ e4m3:row|1' -> bf16"
SIZES = {CAST: (512, 512), GEMM: (512, 512, 512)}
CARD = {
    "multi_processor_count": 132,
    "cc": 90,
    "major": 9,
    "minor": 0,
    "name": "a card",
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
    "L2_cache_size": 1 << 25,
}


class Driver:
    """As much of Triton's driver as the generation of code asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def _card(monkeypatch):
    """An sm_90 as far as Inductor's code generation looks."""
    known = {key: value for key, value in CARD.items() if key in DeviceProperties.__annotations__}
    monkeypatch.setattr(DeviceProperties, "create", lambda _: DeviceProperties(type="cuda", index=0, **known))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: types.SimpleNamespace(**CARD))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._inductor.scheduler, "has_triton", lambda *_: True)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    if hasattr(torch.utils._triton.triton_backend, "cache_clear"):
        torch.utils._triton.triton_backend.cache_clear()


def emitted(schedule: Schedule | None = None) -> Callable[..., object]:
    return lambda text, *_: emit(parse(text), Sizes.of(*SIZES[text]), find_target("sm_90"), schedule)


def graph(text: str) -> tuple[torch.fx.GraphModule, list[torch.Tensor]]:
    """One fused node on fake CUDA tensors."""
    call, mode = example(parse(text), SIZES[text]), FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        inputs = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in call.inputs]
        fused = torch.ops.lowprec.fused
        return make_fx(lambda *given: fused(list(given), text, call.sizes, None, call.uses, call.spins))(*inputs), inputs


def inductor(text: str, schedule: Schedule | None = None) -> str:
    """The code that Inductor generates for a fused node after `reveal`."""
    module, inputs = graph(text)
    mode = inputs[0].fake_mode
    with V.set_fake_mode(mode), config.patch(post_grad_custom_post_pass=lambda g: reveal.reveal(g, emitted(schedule)) and None):
        post_grad_passes(module, True)
        lowering = GraphLowering(module, example_inputs=inputs, shape_env=mode.shape_env)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            code = lowering.codegen()[0]
    assert not set(lowering.mutated_inputs), "an input counts as written"
    return getattr(code, "value", code)


def test_inductor_launches_the_functions_of_a_cast():
    code = inductor(CAST)
    assert code.count("@triton_heuristics.user_autotune") == 2
    assert "def cast_kernel(" in code and "cast_kernel_1.run(arg0_1, buf" in code and "amax_kernel_0.run(arg0_1, buf" in code
    assert "lowprec" not in code
    assert code.count("empty_strided_cuda((512, 512), (512, 1), torch.float8_e4m3fn)") == 2, "nothing is copied"


def test_inductor_launches_a_product_that_reads_through_pointers():
    code = inductor(GEMM, Schedule((128, 128, 64), 8, 3))
    assert "gemm_0.run(arg0_1, " in code and "lowprec" not in code


def test_tensor_descriptors_stay_opaque():
    module, _ = graph(GEMM)
    assert reveal.reveal(module.graph, emitted(Schedule((128, 128, 128), 8, 3, tma=True))) == 0
    assert "torch.ops.lowprec.fused" in module.code


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_stays_opaque_is_called_directly_on_its_device(monkeypatch, device: str):
    schedule, operator = Schedule((128, 128, 128), 8, 3, tma=True), torch.ops.lowprec.fused.default
    monkeypatch.setattr(torch.ops.lowprec, "launch", None, raising=False)
    # Whoever compiled before, in this process, may have lowered the operator.
    monkeypatch.delitem(lowering.lowerings, operator, raising=False)
    direct.call_directly(launch.run, (device,))
    code = inductor(GEMM, schedule)
    assert ("torch.ops.lowprec.launch([arg0_1, " in code) is (device == "cuda")
    assert ("torch.ops.lowprec.fused.default([arg0_1, " in code) is (device == "cpu")


def test_what_would_round_differently_stays_opaque(monkeypatch):
    source = emitted()(CAST)
    assert reveal.same_arithmetic(source)
    contracted = types.SimpleNamespace(ptx="fma.rn.f32 %f1, %f2, %f3, %f4;")
    monkeypatch.setattr(reveal, "compile_entry", lambda *_, **options: contracted if options["contract"] else None)
    assert not reveal.same_arithmetic(source)
    assert reveal.reveal(graph(CAST)[0].graph, emitted()) == 0


def test_the_slot_is_taken_on_request_and_chained(monkeypatch):
    target = find_target("sm_90")
    assert reveal.patched({"a": 1}, target, "digest") == {"a": 1}
    monkeypatch.setenv("LPCOMPILE_REVEAL", "1")
    seen = []
    found = reveal.patched({"post_grad_custom_post_pass": seen.append}, target, "digest")["post_grad_custom_post_pass"]
    module, _ = graph(GEMM)
    module.graph.eliminate_dead_code()
    monkeypatch.setattr(reveal, "trusted", lambda *_: emitted(Schedule((128, 128, 64), 8, 3))(GEMM))
    found(module.graph)
    assert seen == [module.graph] and "triton_kernel_wrapper" in str(module.graph)
    assert found.uuid() is None, "a user's pass without a uuid switches the caches off"
    assert reveal.Reveal(None, target, "digest").uuid() == ("sm_90", "digest", None)
    assert reveal.patched({}, find_target("cpu"), "digest") == {}
