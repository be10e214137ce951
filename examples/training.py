"""What the examples share: compile under a recipe, train with a progress bar, and show what came of each run."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

BASELINE = "inductor"
"""The run without us: plain `torch.compile(model)`."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Batch = tuple[Tensor, ...]


def default_dtype() -> str:
    """What to train in: bf16, but fp32 on a CPU whose products in bf16 take longer (with AVX2 alone 60 times as long)."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    quick = torch.cuda.is_available() or (supported is not None and bool(supported()))
    return "bf16" if quick else "fp32"


@dataclass(frozen=True)
class Outcome:
    """One run. losses: one per step; heldout: after training, before: before it; step_ms: median of the warm steps,
    first_step_s: the first one, which compiles; both 0 where there was no step."""

    name: str
    losses: list[float]
    heldout: float
    step_ms: float = 0.0
    first_step_s: float = 0.0
    before: float | None = None

    @property
    def final(self) -> float:
        """Mean training loss of the last tenth of the steps, of which there must be one."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])


@dataclass(frozen=True)
class Optimization:
    """AdamW with linear warm-up over the first tenth of the steps, a cosine down to a tenth, and clipped gradients."""

    learning_rate: float
    weight_decay: float = 0.1
    clip: float = 1.0

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of one step, counted from 0."""
        warmup = max(1, steps // 10)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def runs_of(recipes: Sequence[str]) -> list[str]:
    """The baseline and then each recipe once; every `--recipe` may hold several, separated by commas."""
    names = [name.strip() for text in recipes for name in text.split(",") if name.strip()]
    return list(dict.fromkeys([BASELINE, *names]))


def compiled(model: nn.Module, recipe: str, executor: str, blocks: Iterable[nn.Module] = ()) -> Callable[..., Any]:
    """The model compiled without us (BASELINE) or by `backend="lowprec"` under this recipe.

    Where blocks are given (regional compilation) each of them is compiled instead of the whole; equal blocks share one
    compilation.
    """
    torch._dynamo.reset()  # one run's guards and graphs must not cost the next run time
    how: dict[str, Any] = {}
    if recipe != BASELINE:
        how = {"backend": "lowprec", "options": {"recipe": recipe, "executor": executor}}
    blocks = list(blocks)
    for block in blocks:
        block.compile(**how)
    return model if blocks else torch.compile(model, **how)


def train(
    name: str,
    parameters: Sequence[nn.Parameter],
    loss_of: Callable[..., Tensor],
    batches: Sequence[Batch],
    optimization: Optimization,
    console: Console,
) -> tuple[list[float], list[float]]:
    """One optimizer step a batch, under a progress bar. Returns each step's loss and its milliseconds."""
    optimizer = torch.optim.AdamW(parameters, weight_decay=optimization.weight_decay, fused=True)
    losses: list[float] = []
    milliseconds: list[float] = []
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=len(batches), state="compiling")
        for step, batch in enumerate(batches):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = optimization.rate(step, len(batches))
            loss = loss_of(*batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, optimization.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            milliseconds.append(1e3 * (time.perf_counter() - started))
            progress.update(task, advance=1, state=f"loss {losses[-1]:.3f}  {milliseconds[-1]:.0f} ms/step")
    return losses, milliseconds


def warm_median(milliseconds: Sequence[float]) -> float:
    """Median of the steps after the first two, which compile and warm up."""
    warm = milliseconds[2:] or milliseconds
    return statistics.median(warm) if warm else 0.0


def results_table(outcomes: Sequence[Outcome], title: str) -> Table:
    """Loss, speed and compile time of each run beside the first one."""
    baseline = outcomes[0]
    table = Table(title=title, box=SIMPLE_HEAD, padding=0)
    trained, had_before = bool(baseline.losses), baseline.before is not None
    headings = ["run", *(["before"] if had_before else []), "held-out", "gap"]
    if trained:
        headings += ["train", "gap", "ms/step", "ratio", "first s"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    for outcome in outcomes:
        row = [outcome.name, *([f"{outcome.before:.4f}"] if outcome.before is not None else [])]
        row += [f"{outcome.heldout:.4f}", _gap(outcome.heldout, baseline.heldout, outcome is baseline)]
        if trained:
            row += [
                f"{outcome.final:.4f}",
                _gap(outcome.final, baseline.final, outcome is baseline),
                f"{outcome.step_ms:.1f}",
                f"{outcome.step_ms / baseline.step_ms:.2f}x",
                f"{outcome.first_step_s:.0f}",
            ]
        table.add_row(*row)
    return table


def _gap(value: float, reference: float, is_reference: bool) -> str:
    return "" if is_reference else f"{value - reference:+.4f}"


def write_results(outcomes: Sequence[Outcome], settings: dict[str, Any], folder: Path) -> tuple[Path, ...]:
    """Writes `results.json` and, where there was training, `loss.png` into `folder`; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "settings": settings,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "runs": [asdict(outcome) for outcome in outcomes],
    }
    results = folder / "results.json"
    results.write_text(json.dumps(report, indent=2) + "\n")
    if not outcomes[0].losses:
        return (results,)
    plot = folder / "loss.png"
    plot_losses(outcomes, plot)
    return results, plot


def plot_losses(outcomes: Sequence[Outcome], path: Path) -> None:
    """Left: each run's loss. Right: its distance from the first run on the same batches, where small gaps show."""
    from matplotlib.figure import Figure

    baseline, *others = outcomes
    window = max(1, len(baseline.losses) // 20)
    steps = range(1, len(baseline.losses) + 1)
    figure = Figure(figsize=(11 if others else 6, 4.2), layout="constrained")
    panels = list(figure.subplots(1, 2 if others else 1, squeeze=False)[0])
    panels[0].set(xlabel="step", ylabel="training loss", title="Training loss")
    for index, outcome in enumerate(outcomes):
        panels[0].plot(steps, _smooth(outcome.losses, window), label=outcome.name, color=f"C{index}", linewidth=1.5)
    if others:
        title = f"Gap to {baseline.name}, same batches"
        panels[1].set(xlabel="step", ylabel=f"loss - loss of {baseline.name}", title=title)
        panels[1].axhline(0.0, color="gray", linewidth=0.8)
    for index, outcome in enumerate(others, start=1):
        gap = [mine - theirs for mine, theirs in zip(outcome.losses, baseline.losses, strict=True)]
        panels[1].plot(steps, _smooth(gap, window), label=outcome.name, color=f"C{index}", linewidth=1.5)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean over up to `window` values."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
