"""The part of `device.py` that proves: generated kernels and whole training steps against the reference.

Every kernel runs on fresh random numbers, at sizes that tiles divide and at sizes that nothing divides, with a NaN and an
infinity for what quantises. Its output memory is poisoned twice, with different bytes, so that an element which was not
written shows. Whole steps compare loss and gradients with the reference executor on the same GPU.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from cross_compile import texts
from device_layers import llama_8b
from device_run import ROOT, Case, Part, Row, Settings, compiled, launches
from torch import Tensor, nn

from lpcompile.codegen import emit, module, schedules
from lpcompile.codegen.example import Example, example, mismatch
from lpcompile.codegen.quick import quick
from lpcompile.codegen.source import Schedule, Sizes
from lpcompile.codegen.tune import failures
from lpcompile.kernel import CastKernel, GemmKernel, Kernel, parse
from lpcompile.target import Target, find_target

STEP_RECIPES = (
    "fp8-rowwise",
    "deepseek",
    "halo2-int8",
    "mxfp8",
    "nvfp4",
    "quartet2",
    "quartet",
    "mxfp4",
    "fp8-tensorwise",
    "int8-rowwise",
)
# Rounding, bit widths and prologues that no recipe's table shows.
MORE_CASTS = {
    "e5m2 row": "cast x0:bf16 = x0 as bf16 -> e5m2:row|1, e5m2:row|0'",
    "e4m3 sr": "cast x0:bf16 = x0 as bf16 -> e4m3:row:up:sr|1",
    "e4m3 sr8": "cast x0:bf16 = x0 as bf16 -> e4m3:1x32:e8m0:up:sr8|1",
    "e4m3 trunc": "cast x0:bf16 = x0 as bf16 -> e4m3:1x128:trunc|1, e4m3:1x128:trunc|0'",
    "e3m2": "cast x0:bf16 = x0 as bf16 -> e3m2:tensor:clip=0.75|1",
    "e2m3": "cast x0:f32 = x0 as f32 -> e2m3:1x32:e8m0:floor|1",
    "int4": "cast x0:bf16 = x0 as bf16 -> int4:1x32|1",
    "int8 sr": "cast x0:f16 = x0 as f16 -> int8:row:sr|1",
    "fp32": "cast x0:f32 = x0 as f32 -> e4m3:1x128|1, e4m3:1x128|0'",
    "mx nearest": "cast x0:bf16 = x0 as bf16 -> e5m2:1x32:e8m0:nearest|1",
    "nvfp4 both": "cast x0:bf16 = x0 as bf16 -> e2m1:1x16:e4m3+f32|1, e2m1:1x16:e4m3+f32:sr8|0|0:h16drawn'",
    "large turn": "cast x0:bf16 = x0 as bf16 -> int8:tensor|1|1:h512, int8:tensor|1|0:h512",
    "silu up dual": "cast x0:bf16 x1:bf16 = mul(silu(x0), x1) as bf16 -> keep, e4m3:row:up|1, e4m3:row:up|0'",
}
MATRICES = ((256, 512), (129, 257), (1, 1000), (640, 48))
PRODUCTS = ((256, 384, 512), (129, 264, 400), (1, 64, 1024), (384, 136, 2048))


def _cases(settings: Settings) -> list[Case]:
    target = _target(settings).name
    seed = time.time_ns() % 1_000_000
    found: list[Case] = []
    for family in ("gemm", "cast", "requant", "decode"):
        # A dry run proves the paths: the names are those of a Hopper.
        named = dict(texts(family, "sm_90" if settings.dry else target))
        named |= MORE_CASTS if family == "cast" else {}
        keep = 1 if settings.dry else 4 if settings.quick else None
        found += [
            {"name": f"{family} {name}", "kind": "kernel", "text": text, "seed": seed}
            for name, text in list(named.items())[:keep]
        ]
    if settings.dry:
        return [*found, {"name": "step example", "kind": "step", "model": "example", "recipe": "fp8-rowwise", "graphs": False}]
    recipes = [name for name in STEP_RECIPES if name in settings.recipes][: 2 if settings.quick else None]
    for model in ("example", "8b"):
        for recipe in recipes if model == "example" else recipes[:4]:
            name = {"kind": "step", "model": model, "recipe": recipe}
            found += [{"name": f"step {model} {recipe}", **name, "graphs": False}]
            found += [{"name": f"step {model} {recipe} graphs", **name, "graphs": True}]
    return found


def _target(settings: Settings) -> Target:
    return find_target("auto", settings.device)


def _run(case: Case, settings: Settings, _before: list[Row]) -> Row:
    return _kernel(case, settings) if case["kind"] == "kernel" else _step(case, settings)


# ---- kernels -----------------------------------------------------------------------------------------------------


def _kernel(case: Case, settings: Settings) -> Row:
    kernel = parse(case["text"])
    sizes = PRODUCTS if isinstance(kernel, GemmKernel) else MATRICES
    passed, failed, none = 0, [], []
    for size in sizes[1:2] if settings.dry else sizes[: 2 if settings.quick else None]:
        for schedule in _schedules(kernel, size, settings):
            for label, call in _calls(kernel, size, case["seed"], settings):
                where = f"{'x'.join(map(str, size))} {label} [{schedule}]"
                try:
                    wrong = _wrong(call, size, schedule, settings)
                except failures(schedule) as error:
                    none.append(f"{where}: {str(error)[:160]}")
                    continue
                failed += [f"{where}: {each}" for each in wrong]
                passed += not wrong
    return {"passed": passed, "failed": failed, "none": none}


def _schedules(kernel: Kernel, size: Sequence[int], settings: Settings) -> list[Schedule]:
    """The default, and one that differs most where there are several."""
    if settings.dry:
        return [Schedule((64, 64))]
    try:
        found = schedules(kernel, Sizes.of(*size), _target(settings))
    except failures():
        return [Schedule((64, 64, 64))]
    return list(dict.fromkeys([found[0], found[-1]])) if isinstance(kernel, GemmKernel) else [found[0]]


def _calls(kernel: Kernel, size: Sequence[int], seed: int, settings: Settings) -> Iterator[tuple[str, Example]]:
    call = example(kernel, size, settings.device, seed)
    yield "random", call
    if isinstance(kernel, CastKernel):
        x = call.inputs[0].clone()
        x[-1, -1], x[0, x.shape[1] // 2] = float("nan"), float("inf")
        yield "nan", replace(call, inputs=[x, *call.inputs[1:]])
        yield "zeros", replace(call, inputs=[torch.zeros_like(x), *call.inputs[1:]])


def _wrong(call: Example, size: Sequence[int], schedule: Schedule, settings: Settings) -> list[str]:
    """What is wrong with a kernel's results under each poison."""
    launch: Callable[..., list[Tensor]]
    if settings.dry:
        launch = lambda *_: call.reference()  # noqa: E731
    else:
        # The second time it is carried out from the notes of the first.
        launch = quick(module.load(emit(call.kernel, Sizes.of(*size), _target(settings), schedule)))
    expected = call.reference()
    found = []
    for byte in (0xA5, 0x5A):
        # The allocator hands out again what was freed last: the results come to lie in these bytes.
        poison = [torch.full((max(each.nbytes, 1),), byte, dtype=torch.uint8, device=each.device) for each in expected]
        del poison
        results = launch(call.inputs, call.sizes, call.seed, call.uses, call.spins)
        if wrong := mismatch(call.kernel, results, expected):
            found.append(wrong)
    return found


# ---- training steps ----------------------------------------------------------------------------------------------


def _step(case: Case, settings: Settings) -> Row:
    """One step under both executors. error: the largest relative error of a gradient in the 2-norm."""
    # What is proven here is the kernels, not which schedule is fastest.
    os.environ["LPCOMPILE_AUTOTUNE"] = "0"
    model, loss_of = _example(settings) if case["model"] == "example" else _llama(settings)
    theirs = _gradients(_reference(model, case["recipe"]), model, loss_of, 1)
    ours = compiled(model, case["recipe"], replace(settings, graphs=case["graphs"], always=True))
    # Under CUDA graphs the first calls warm up and record.
    mine = _gradients(ours, model, loss_of, 4 if case["graphs"] else 1)
    errors = {name: _relative(mine[1][name], each) for name, each in theirs[1].items()}
    worst = max(errors, key=lambda name: errors[name])
    # A code that a rounded sum flips is a quantisation step off; what is misplaced or missing is off by 1.
    limit = 0.4 if any(mark in case["recipe"] for mark in ("fp4", "quartet", "int4")) else 0.15
    loss = abs(mine[0] - theirs[0]) / abs(theirs[0])
    row: Row = {"loss_error": loss, "gradient_error": errors[worst], "worst": worst}
    fallbacks = launches()["fallbacks"]
    wrong = {name: error for name, error in errors.items() if error > limit}
    if wrong:
        # A gradient that nearly cancels: two executors may differ by what quantisation itself changes, not by more.
        plain = _gradients(_reference(model, "none"), model, loss_of, 1)[1]
        noise = {name: _relative(theirs[1][name], plain[name]) for name in wrong}
        wrong = {name: error for name, error in wrong.items() if error > min(noise[name], 0.5)}
        row["noise"] = max(noise.values())
    failed = [f"{name} off by {error:.3g}" for name, error in wrong.items()] + (
        [f"loss off by {loss:.2g}"] if loss > 0.02 else []
    )
    row |= {"passed": int(not failed), "failed": failed}
    return row | {"none": [f"{kernel}: {why}" for kernel, why in fallbacks.items()]}


def _relative(found: Tensor, expected: Tensor) -> float:
    norm = float(expected.double().norm())
    error = float((found.double() - expected.double()).norm()) / max(norm, 1e-30)
    return error if error == error else float("inf")  # noqa: PLR0124


LossOf = Callable[[Any], Tensor]


def _example(settings: Settings) -> tuple[nn.Module, LossOf]:
    sys.path.insert(0, str(ROOT / "examples"))
    from llama import Llama, LlamaConfig

    torch.manual_seed(0)
    hidden, layers, seq = (64, 1, 32) if settings.dry else (384, 2, 256)
    model = Llama(LlamaConfig.sized(hidden, layers, seq=seq)).to(torch.bfloat16).to(settings.device)
    tokens = torch.randint(256, (2, seq), device=settings.device)
    return model, lambda step: step(tokens, tokens)


def _llama(settings: Settings) -> tuple[nn.Module, LossOf]:
    model = llama_8b(2, settings)
    tokens = torch.randint(32000, (1, 512), device=settings.device)
    return model, lambda step: step(input_ids=tokens, labels=tokens).loss


def _reference(model: nn.Module, recipe: str) -> Any:
    from lpcompile.backend import lowprec

    torch._dynamo.reset()
    return torch.compile(
        model, dynamic=False, backend=lowprec, options={"recipe": recipe, "executor": "reference", "always": True}
    )


def _gradients(step: Any, model: nn.Module, loss_of: LossOf, calls: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the last of some equal steps."""
    for _ in range(calls):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        loss = loss_of(step)
        loss.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    torch._dynamo.reset()
    return float(loss.detach()), gradients


def _lines(rows: list[Row]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("correct", "pass", "fail", "none")]
    for family in ("gemm", "cast", "requant", "decode", "step"):
        mine = [row for row in rows if row["name"].startswith(family) and "passed" in row]
        counts = sum(row["passed"] for row in mine), *(sum(len(row[key]) for row in mine) for key in ("failed", "none"))
        lines.append((family, *map(str, counts)))
    for row in rows:
        bad = [("FAIL", each) for each in row.get("failed", [])] + [("none", each) for each in row.get("none", [])]
        lines += [(f"{kind} {row['name']}: {each[:230]}",) for kind, each in bad[:2]]
    return lines


CORRECT = Part("correct", _cases, _run, _lines, limit=240, jobs=6)
