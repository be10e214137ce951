"""The part of `device.py` about single kernels: casts in GB/s against the copy, products in TFLOP/s against the vendor's.

Every schedule that the model proposes is timed, so that the best, the model's choice and what it predicted stand side by side.
"""

from __future__ import annotations

import functools
from typing import Any

from cross_compile import ROWS_BOTH, SWIGLU_GRADIENTS
from device_ceilings import copy_rate, vendor
from device_run import Case, Part, Row, Settings, milliseconds

from lpcompile.carrier import CARRIER, carrying
from lpcompile.codegen import emit, module, schedules
from lpcompile.codegen.example import example
from lpcompile.codegen.source import Sizes
from lpcompile.codegen.tune import failures
from lpcompile.kernel import GemmKernel, parse
from lpcompile.kernel_cost import kernel_cost
from lpcompile.target import find_target

ROWS = "cast x0:bf16 = x0 as bf16 -> "
CASTS = {
    "1x128": ROWS + "e4m3:1x128|1",
    "1x128 both": ROWS + "e4m3:1x128|1, e4m3:1x128|0'",
    "128x128 both": ROWS + "e4m3:128x128|1, e4m3:128x128|1'",
    "row": ROWS + "e4m3:row:up|1",
    "row both": ROWS + "e4m3:row:up|1, e4m3:row:up|0'",
    "tensor both": ROWS + "e4m3:tensor|1, e4m3:tensor|1'",
    "int8 row both": ROWS + "int8:row|1, int8:row|0'",
    "mx8 decoded both": ROWS + "e4m3:1x32:e8m0:up|1~, e4m3:1x32:e8m0:up|0~'",
    "mx4 both": ROWS + "e2m1:1x32:e8m0:up|1, e2m1:1x32:e8m0:up|0'",
    "mx4 carried both": ROWS + f"e2m1:1x32:e8m0:up|1~{CARRIER}, e2m1:1x32:e8m0:up|0~{CARRIER}'",
    "quest carried": ROWS + f"e2m1:1x32:e8m0:quest|1|1:h32~{carrying(32)}, e2m1:1x32:e8m0:quest|1|1:h32",
    "nvfp4 both h16": ROWS + "e2m1:1x16:e4m3+f32:sr8|1, e2m1:1x16:e4m3+f32:sr8|0|0:h16fixed'",
    "1x128 both h32": ROWS + "e4m3:1x128|1, e4m3:1x128|0|0:h32fixed'",
    "mx8 both h32": ROWS + "e4m3:1x32:e8m0:up|1|1:h32, e4m3:1x32:e8m0:up|0|0:h32'",
    "tensor both h32": ROWS + "e4m3:tensor|1|1:h32, e4m3:tensor|1|0:h32'",
    "4 or 6, decoded too": ROWS + "e2m1:1x16:e4m3+f32:4over6|1~, e2m1:1x16:e4m3+f32:4over6|1",
    "eden both h128": ROWS + "e2m1:1x16:e4m3+f32:eden|0|0:h128drawn~, e2m1:1x16:e4m3+f32:eden|1|1:h128drawn~",
    "int8 tensor h4096": ROWS + "int8:tensor|1|1:h4096",
    "swiglu 1x128 both": "cast x0:bf16 x1:bf16 = mul(silu(x0), x1) as bf16 -> e4m3:1x128|1, e4m3:1x128|0'",
    "swiglu dX row both": f"{SWIGLU_GRADIENTS} -> {ROWS_BOTH}; {ROWS_BOTH}",
    "decode nvfp4": "decode e2m1:1x16:e4m3+f32|1",
}
CAST_SHAPES: tuple[tuple[int, ...], ...] = ((16384, 4096), (16384, 14336))
GEMMS = {
    "fp8 row": ("gemm e4m3:row:up|1 @ e4m3:row:up|1' -> bf16", "fp8 row fast"),
    "fp8 tensor": ("gemm e4m3:tensor|1 @ e4m3:tensor|1' -> bf16", "fp8 tensor fast"),
    "1x128 @ 128x128": ("gemm e4m3:1x128|1 @ e4m3:128x128|1' -> bf16", "fp8 row fast"),
    "1x128 @ 1x128": ("gemm e4m3:1x128|1 @ e4m3:1x128|1' -> bf16", "fp8 row fast"),
    "int8 row": ("gemm int8:row|1 @ int8:row|1' -> bf16", "int8"),
    "mx4 carried": (f"gemm {CARRIER}|1 @ {CARRIER}|1' -> bf16", "fp8 row fast"),
    "nvfp4 decoded": ("gemm e2m1:1x16:e4m3+f32|1~ @ e2m1:1x16:e4m3+f32|1~' -> bf16", "bf16"),
}
# M, N, K: Llama-8B's at 8192 and 16384 tokens, then DeepSeek-V3's (the published table of DeepGEMM).
GEMM_SHAPES: tuple[tuple[int, ...], ...] = (
    *((16384, 14336, 4096), (16384, 4096, 14336), (14336, 4096, 16384), (16384, 4096, 4096)),
    *((8192, 14336, 4096), (8192, 4096, 14336), (8192, 4096, 4096)),
)
DEEPSEEK: tuple[tuple[int, ...], ...] = (
    *((4096, 7168, 16384), (4096, 4096, 7168), (4096, 7168, 2048), (4096, 24576, 1536), (4096, 2112, 7168), (4096, 32768, 512)),
)
_SCHEDULES = 4


def _cases(settings: Settings) -> list[Case]:
    cast_shapes, gemm_shapes = CAST_SHAPES, GEMM_SHAPES + DEEPSEEK
    if settings.quick:
        cast_shapes, gemm_shapes = cast_shapes[1:], gemm_shapes[:2]
    if settings.dry:
        cast_shapes, gemm_shapes = ((64, 128),), ((64, 128, 256),)
    products = [
        {"name": f"{name} {m}x{n}x{k}", "text": text, "vendor": rival, "sizes": [m, n, k]}
        for m, n, k in gemm_shapes
        for name, (text, rival) in GEMMS.items()
        if (m, n, k) not in DEEPSEEK or "1x128" in name
    ]
    casts = [
        {"name": f"{name} {rows}x{cols}", "text": text, "sizes": [rows, cols]}
        for rows, cols in cast_shapes[::-1]
        for name, text in CASTS.items()
    ]
    if settings.dry:
        return casts[:2] + products[:2]
    return casts + products


_copy = functools.cache(copy_rate)


@functools.lru_cache(maxsize=4)
def _vendor(kind: str, m: int, n: int, k: int, settings: Settings) -> float:
    call = vendor(kind, m, n, k, settings)
    for _ in range(3):
        call()
    return milliseconds(call, settings.device, cold=True)


def _run(case: Case, settings: Settings, _before: list[Row]) -> Row:
    kernel, sizes = parse(case["text"]), tuple(case["sizes"])
    target = find_target("sm_90" if settings.dry else "auto", settings.device)
    cost = kernel_cost(kernel, sizes, target)
    call = example(kernel, sizes, settings.device)
    times: dict[str, float] = {}
    errors: list[str] = []
    if settings.dry:
        times["reference"] = milliseconds(call.reference, settings.device)
    else:
        for schedule in schedules(kernel, Sizes.of(*sizes), target)[:_SCHEDULES]:
            try:
                launch = module.load(emit(kernel, Sizes.of(*sizes), target, schedule)).launch
                run = functools.partial(launch, call.inputs, call.sizes, call.seed, call.uses, call.spins)
                for _ in range(1 if case.get("warm") else 3):
                    run()
                times[str(schedule)] = 0.0 if case.get("warm") else milliseconds(run, settings.device, cold=True)
            except failures(schedule) as error:
                errors.append(f"{schedule}: {str(error)[:200]}")
    if case.get("warm") or not times:
        return {"times": times, "errors": errors}
    return _row(case, kernel, cost, times, errors, settings)


def _row(case: Case, kernel: Any, cost: Any, times: dict[str, float], errors: list[str], settings: Settings) -> Row:
    best = min(times, key=lambda name: times[name])
    ms = times[best]
    row: Row = {"ms": ms, "first_ms": next(iter(times.values())), "schedule": best, "times": times, "errors": errors}
    row["predicted_ms"] = float(cost.time(find_target("sm_90" if settings.dry else "auto", settings.device))) / 1e3
    if isinstance(kernel, GemmKernel):
        theirs = _vendor(case["vendor"], *case["sizes"], settings)
        return row | {"rate": cost.flops / ms * 1e-9, "share": theirs / ms, "rival": cost.flops / theirs * 1e-9}
    # Bytes that must move, whatever the kernel reads twice.
    gbs = float(cost.minimum) / ms * 1e-6
    return row | {
        "rate": gbs,
        "moved_gbs": float(cost.moved) / ms * 1e-6,
        "share": gbs / _copy(settings),
        "rival": _copy(settings),
    }


def _lines(rows: list[Row]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("kernel", "GB/s | TFLOP/s", "rival", "share", "ms", "first ms", "predicted", "schedule")]
    for row in rows:
        if "rate" in row:
            numbers = [f"{row['rate']:.0f}", f"{row['rival']:.0f}", f"{row['share']:.2f}"]
            numbers += [f"{row[key]:.3f}" for key in ("ms", "first_ms", "predicted_ms")]
            lines.append((row["name"], *numbers, row["schedule"][:60]))
        elif row.get("errors"):
            lines.append((row["name"], "no schedule runs", row["errors"][0][:120]))
    return lines


KERNELS = Part("kernels", _cases, _run, _lines, limit=120, warm=8)
