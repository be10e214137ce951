"""Parts of `device.py` about single kernels: the ceilings of the card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from device_run import Case, Part, Row, Settings, milliseconds, randn
from torch import Tensor

# M x N x K of Llama-8B's products, and of a weight gradient of DeepSeek-V3.
SHAPES = ((8192, 14336, 4096), (8192, 4096, 14336), (4096, 7168, 16384))
KINDS = ("bf16", "fp8 tensor", "fp8 tensor fast", "fp8 row", "fp8 row fast", "int8")


def _ceilings_cases(settings: Settings) -> list[Case]:
    shapes = [(64, 96, 128)] if settings.dry else SHAPES[: 1 if settings.quick else None]
    names: list[Case] = [{"name": "copy", "kind": "copy"}]
    return names + [{"name": f"{kind} {m}x{n}x{k}", "kind": kind, "shape": [m, n, k]} for m, n, k in shapes for kind in KINDS]


def vendor(kind: str, m: int, n: int, k: int, settings: Settings) -> Callable[[], Any]:
    """The vendor's product of random operands of a kind: [m, k] @ [k, n], the right one column-major."""
    a, b = randn(m, k, settings=settings), randn(n, k, settings=settings).mT
    if kind == "bf16":
        return lambda: a @ b
    if kind == "int8":
        codes = [(each * 32).clamp(-127, 127).to(torch.int8) for each in (a, b)]
        return lambda: torch._int_mm(*codes)
    left, right = (each.to(torch.float8_e4m3fn) for each in (a, b))
    one, rows, cols = (torch.rand(shape, device=settings.device) + 0.5 for shape in ((), (m, 1), (1, n)))
    scales: tuple[Tensor, Tensor] = (rows, cols) if "row" in kind and not settings.dry else (one, one)
    fast = kind.endswith("fast") and not settings.dry

    def product() -> Any:
        return torch._scaled_mm(left, right, *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)

    return product


def copy_rate(settings: Settings) -> float:
    """GB/s of a large copy, bytes read and written."""
    source = randn(1 << (12 if settings.dry else 30), settings=settings)
    target = torch.empty_like(source)
    return 2e-6 * source.numel() * source.element_size() / milliseconds(lambda: target.copy_(source), settings.device)


def _ceilings_run(case: Case, settings: Settings, _before: list[Row]) -> Row:
    if case["kind"] == "copy":
        return {"gbs": copy_rate(settings)}
    m, n, k = case["shape"]
    call = vendor(case["kind"], m, n, k, settings)
    for _ in range(3):
        call()
    return {"tflops": 2e-9 * m * n * k / milliseconds(call, settings.device, 20)}


def _ceilings_lines(rows: list[Row]) -> list[tuple[str, ...]]:
    copy = next((row["gbs"] for row in rows if "gbs" in row), 0.0)
    good = [row for row in rows if "tflops" in row]
    shapes = list(dict.fromkeys("x".join(map(str, row["shape"])) for row in good))
    lines: list[tuple[str, ...]] = [("vendor TFLOP/s, MxNxK", *shapes), ("copy GB/s", f"{copy:.0f}")]
    for kind in KINDS:
        mine = {"x".join(map(str, row["shape"])): row["tflops"] for row in good if row["kind"] == kind}
        lines.append((kind, *(f"{mine[shape]:.0f}" if shape in mine else "-" for shape in shapes)))
    return lines


CEILINGS = Part("ceilings", _ceilings_cases, _ceilings_run, _ceilings_lines, limit=90)
