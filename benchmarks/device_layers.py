"""Parts of `device.py` that train: one linear layer, transformers' Llama with the layer shapes of 8B, a run on real text."""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from device_run import (
    BASELINE,
    ROOT,
    TORCHAO,
    Case,
    Part,
    Row,
    Settings,
    compiled,
    contenders,
    in_turns,
    launches,
    peak_memory,
    profiled,
    randn,
    synchronize,
)
from torch import nn

LINEAR_SHAPES = ((4096, 14336), (14336, 4096), (4096, 4096))  # in-features, out-features

# ---- linear ------------------------------------------------------------------------------------------------------


def _linear_cases(settings: Settings) -> list[Case]:
    shapes = [(m, k, n) for m in sorted(settings.tokens, reverse=True) for k, n in LINEAR_SHAPES]
    shapes = [(64, 128, 96)] if settings.dry else shapes[:2] if settings.quick else shapes
    names = [name for name in contenders(settings) if name != BASELINE]
    return [{"name": f"{m}x{k}x{n} {c}", "shape": [m, k, n], "contender": c} for m, k, n in shapes for c in names]


def _layer_step(m: int, k: int, n: int, contender: str, settings: Settings) -> Callable[[], None]:
    """Forward and backward of a compiled linear layer; the weight's gradient is dropped, not added to."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(k, n, bias=False, device=settings.device, dtype=torch.bfloat16))
    step = compiled(layer, contender, settings)
    x, dy = randn(m, k, settings=settings).requires_grad_(), randn(m, n, settings=settings)
    parameters = [x, *layer.parameters()]

    def run() -> None:
        for each in parameters:
            each.grad = None
        step(x).backward(dy)

    run()
    return run


@functools.lru_cache(maxsize=8)
def _baseline_step(m: int, k: int, n: int, settings: Settings) -> Callable[[], None]:
    return _layer_step(m, k, n, BASELINE, settings)


def _linear_run(case: Case, settings: Settings, _before: list[Row]) -> Row:
    m, k, n = case["shape"]
    if case.get("warm"):
        return {} if case["contender"] in TORCHAO else _compile_candidates(case["contender"], m, n, k, settings)
    baseline = _baseline_step(m, k, n, settings)
    started = time.perf_counter()
    ours = _layer_step(m, k, n, case["contender"], settings)
    synchronize(settings.device)
    compile_s = time.perf_counter() - started
    bf16, own, ratio = in_turns(baseline, ours, settings.device)
    row: Row = {"bf16_ms": bf16, "ms": own, "ratio": ratio, "compile_s": compile_s}
    if settings.profile:
        row["profile"] = profiled(ours, settings)
    return row | {"detail": launches()}


def _compile_candidates(recipe: str, m: int, n: int, k: int, settings: Settings) -> Row:
    """Launches every schedule that the first call of a layer would time, so that it finds them compiled on the disk."""
    from lpcompile.codegen import emit, module, schedules, tune
    from lpcompile.codegen.example import example
    from lpcompile.codegen.source import Sizes
    from lpcompile.layer import layer_kernels
    from lpcompile.target import find_target

    target = find_target("auto", settings.device)
    launched = 0
    for each in layer_kernels(recipe, target.name, (m, n, k)):
        call, sizes = example(each.kernel, each.sizes, settings.device), Sizes.of(*each.sizes)
        for schedule in schedules(each.kernel, sizes, target)[: tune._CANDIDATES]:
            try:
                launch = module.load(emit(each.kernel, sizes, target, schedule)).launch
                launch(call.inputs, call.sizes, call.seed, call.uses, call.spins)
                launched += 1
            except tune.failures(schedule):
                continue
    return {"launched": launched}


def _linear_lines(rows: list[Row]) -> list[tuple[str, ...]]:
    """Ratios to bf16: a line a contender, a column a shape."""
    good = [row for row in rows if "ratio" in row]
    shapes = list(dict.fromkeys("x".join(map(str, row["shape"])) for row in good))
    lines: list[tuple[str, ...]] = [("x bf16 (fwd + bwd)", *shapes)]
    bf16 = {"x".join(map(str, row["shape"])): row["bf16_ms"] for row in good}
    lines.append(("bf16 ms", *(f"{bf16[shape]:.3f}" for shape in shapes)))
    for contender in dict.fromkeys(row["contender"] for row in good):
        mine = {"x".join(map(str, row["shape"])): row["ratio"] for row in good if row["contender"] == contender}
        lines.append((contender, *(f"{mine[shape]:.2f}" if shape in mine else "-" for shape in shapes)))
    return lines


LINEAR = Part("linear", _linear_cases, _linear_run, _linear_lines, limit=200, warm=8)

# ---- e2e ---------------------------------------------------------------------------------------------------------


def _e2e_cases(settings: Settings) -> list[Case]:
    names = contenders(settings)[: 3 if settings.quick or settings.dry else None]
    if settings.quick or settings.dry:
        names = [BASELINE, *settings.recipes[:2]]
    return [{"name": name, "contender": name} for name in names]


def llama_8b(layers: int, settings: Settings) -> nn.Module:
    """transformers' Llama with 8B's layer shapes and a small vocabulary, bf16, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    sizes |= {"vocab_size": 32000, "max_position_embeddings": 4096}
    if settings.dry:
        sizes = dict.fromkeys(sizes, 2) | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}
        sizes |= {"max_position_embeddings": 64}
    config = LlamaConfig(num_hidden_layers=layers, attn_implementation="sdpa", use_cache=False, **sizes)
    torch.manual_seed(0)
    with torch.device(settings.device):
        model: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16)
    return model


def _e2e_size(settings: Settings) -> tuple[int, int, int]:
    """(batch, sequence, layers)."""
    return (2, 16, 1) if settings.dry else (2, 4096, 4)


def llama_step(contender: str, settings: Settings) -> tuple[Callable[[], None], list[Any]]:
    """A training step as a contender compiles it, and the list to which it adds its loss."""
    batch, seq, layers = _e2e_size(settings)
    model = llama_8b(layers, settings)
    parameters = list(model.parameters())
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    step_model = compiled(model, contender, settings)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    tokens = torch.randint(vocabulary, (batch, seq), device=settings.device)
    losses: list[Any] = []

    def step() -> None:
        loss = step_model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach().clone())

    return step, losses


def compile_time(step: Callable[[], None], settings: Settings) -> float:
    """Seconds of the first step; two more follow, so that nothing is new to those that are measured."""
    started = time.perf_counter()
    step()
    synchronize(settings.device)
    seconds = time.perf_counter() - started
    for _ in range(2):
        step()
    return seconds


def _e2e_run(case: Case, settings: Settings, before: list[Row]) -> Row:
    batch, seq, _ = _e2e_size(settings)
    step, losses = llama_step(case["contender"], settings)
    compile_s = compile_time(step, settings)
    with peak_memory(settings.device) as memory:
        times = step_times(step, 3 if settings.dry else 15, settings)
    median = statistics.median(times)
    row: Row = {"step_ms": median, "tokens_s": batch * seq / median * 1e3, "compile_s": compile_s, **memory}
    row["loss"] = float(losses[-1])
    first = next((r for r in before if r.get("contender") == BASELINE and "step_ms" in r), None)
    row["ratio"] = first["step_ms"] / median if first else 1.0
    if settings.profile:
        row["profile"] = profiled(step, settings, 60)
    return row | {"detail": launches()}


def step_times(step: Callable[[], None], count: int, settings: Settings) -> list[float]:
    """Wall time of each step with the device drained after it: what a training loop that reads its loss sees."""
    times = []
    for _ in range(count):
        synchronize(settings.device)
        started = time.perf_counter()
        step()
        synchronize(settings.device)
        times.append(1e3 * (time.perf_counter() - started))
    return times


def _e2e_lines(rows: list[Row]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("Llama 8B shapes, 4 layers", "ms", "x bf16", "tokens/s", "peak GiB", "compile s", "loss")]
    for row in rows:
        if "step_ms" in row:
            numbers = [f"{row['step_ms']:.1f}", f"{row['ratio']:.3f}", f"{row['tokens_s']:.0f}", f"{row['peak_gib']:.2f}"]
            lines.append((row["name"], *numbers, f"{row['compile_s']:.0f}", f"{row['loss']:.3f}"))
    return lines


E2E = Part("e2e", _e2e_cases, _e2e_run, _e2e_lines, fresh=True, limit=420)

# ---- train -------------------------------------------------------------------------------------------------------


def _train_cases(settings: Settings) -> list[Case]:
    names = [BASELINE, *settings.recipes[:2]] if settings.quick or settings.dry else contenders(settings)
    seeds = range(settings.seeds)
    return [{"name": f"{name}, seed {seed}", "contender": name, "seed": seed} for seed in seeds for name in names]


def _train_run(case: Case, settings: Settings, before: list[Row]) -> Row:
    """The example Llama (101 M parameters) on Python's own source: every recipe the same batches and steps, and of one seed
    the same weights."""
    sys.path.insert(0, str(ROOT / "examples"))
    from llama import Llama, LlamaConfig
    from train_llama import standard_library, windows
    from training import Optimization

    hidden, layers, batch, seq = (64, 1, 2, 32) if settings.dry else (1024, 9, 32, 1024)
    baselines = [row for row in before if row.get("contender") == BASELINE and "steps" in row]
    torch.manual_seed(case["seed"])
    model = Llama(LlamaConfig.sized(hidden, layers, seq=seq)).to(torch.bfloat16).to(settings.device)
    step_model = compiled(model, case["contender"], settings)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1, fused=True)
    optimization = Optimization(6e-4)
    train_bytes, heldout_bytes = standard_library()

    def batch_of(index: int) -> list[torch.Tensor]:
        return [each.to(settings.device) for each in windows(train_bytes, 1, batch, seq, index)[0]]

    def step(index: int, rate: float) -> torch.Tensor:
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss: torch.Tensor = step_model(*batch_of(index))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach().clone()

    started = time.perf_counter()
    step(0, 0.0)  # compiles, and leaves the weights alone
    synchronize(settings.device)
    compile_s = time.perf_counter() - started
    probe = statistics.median(step_times(lambda: void(step(0, 0.0)), 5, settings))
    steps = int(baselines[0]["steps"]) if baselines else 4 if settings.dry else max(20, int(60e3 * settings.minutes / probe))
    torch.manual_seed(0)
    started = time.perf_counter()
    losses = [step(index, optimization.rate(index, steps)) for index in range(steps)]
    synchronize(settings.device)
    seconds = time.perf_counter() - started
    curve = torch.stack(losses).float().cpu().tolist()
    heldout = _heldout(step_model, windows(heldout_bytes, 2 if settings.dry else 16, batch, seq, 0), settings)
    row: Row = {"steps": steps, "loss": statistics.fmean(curve[-max(1, steps // 20) :]), "heldout": heldout, "curve": curve}
    row |= {"ms": 1e3 * seconds / steps, "compile_s": compile_s}
    row["gap"] = next((heldout - each["heldout"] for each in baselines if each["seed"] == case["seed"]), 0.0)
    if settings.profile:
        row["profile"] = profiled(lambda: void(step(0, 0.0)), settings)
    return row | {"detail": launches()}


def void(_: object) -> None:
    """Drops a value."""


def _heldout(model: Any, batches: list[Any], settings: Settings) -> float:
    with torch.no_grad():
        return statistics.fmean(float(model(*(each.to(settings.device) for each in batch))) for batch in batches)


def _train_lines(rows: list[Row]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("100 M Llama, real text", "steps", "loss", "held-out", "gap to bf16", "ms/step")]
    for row in rows:
        if "heldout" in row:
            numbers = [str(row["steps"]), f"{row['loss']:.4f}", f"{row['heldout']:.4f}", f"{row['gap']:+.4f}"]
            lines.append((row["name"], *numbers, f"{row['ms']:.1f}"))
    return lines


TRAIN = Part("train", _train_cases, _train_run, _train_lines, fresh=True, limit=500)
