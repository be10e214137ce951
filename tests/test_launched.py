"""What a launch compiles is what `compile_entry` compiles without a device: what is said of its resources is true."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lpcompile.codegen import emit, module, schedules
from lpcompile.codegen.compile import compile_entry
from lpcompile.codegen.example import example
from lpcompile.codegen.source import Sizes
from lpcompile.kernel import parse
from lpcompile.target import find_target


class Hopper:
    """As much of Triton's driver as compiling for a launch asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


@dataclasses.dataclass
class Compiles:
    """A jit function that compiles what it is asked to launch."""

    function: Any

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *arguments, **options: self.function.warmup(*arguments, grid=grid, **options)


def compiling(generated: types.ModuleType) -> Callable[..., Any]:
    """The `launch` of a module, which compiles what it would launch."""
    jits = {name: Compiles(each) for name, each in vars(generated).items() if isinstance(each, JITFunction)}
    launch = generated.launch
    return types.FunctionType(launch.__code__, {**vars(generated), **jits}, "launch", launch.__defaults__)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("cast x0:bf16 = x0 as bf16 -> e2m1:1x16:e4m3+f32:sr8|0|0:h16drawn", (256, 512)),
        ("cast x0:bf16 = x0 as bf16 -> int8:tensor|1|1:h512drawn", (300, 512)),
        ("gemm int8:row|1 @ int8:row|1' -> bf16", (2048, 4096, 512)),
        ("gemm e4m3:row:up|1 @ e4m3:row:up|1' -> bf16 * 0:h32drawn", (4096, 2048, 512)),
    ],
)
def test_a_launch_finds_what_was_compiled(text, sizes, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(driver, "_active", Hopper())
    target, kernel = find_target("sm_90"), parse(text)
    schedule = next(each for each in schedules(kernel, Sizes.of(*sizes), target) if not each.vendor)
    source = emit(kernel, Sizes.of(*sizes), target, schedule)
    for entry in source.entries:
        compile_entry(source, entry, target)
    compiled = set(tmp_path.iterdir())
    assert len(compiled) >= len(source.entries)
    call = example(kernel, sizes, torch.device("cpu"))
    # Whatever the numbers of its draws: for 1 and for 16 Triton would compile kernels of their own.
    for number in (0, 1, 5, 16):
        compiling(module.load(source))(call.inputs, call.sizes, call.seed, [number], [number, number])
    assert set(tmp_path.iterdir()) == compiled
