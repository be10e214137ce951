"""What a recipe's rounding costs at fixed weights: forward, backward and both, without the noise of training runs.

    python benchmarks/rounding.py --recipes fp8-rowwise,mxfp4,nvfp4,quartet2 --steps 200

The example Llama is trained in FP32 without us, as in `benchmarks/convergence.py`. At those weights each recipe then runs the
held-out batches, whole and with only its forward or only its backward GEMMs converted, in every block (`keep_last` is off).
Columns: how much the held-out loss rises, in nats; the relative error (Frobenius, all converted weights) of the gradient of one
batch, and of the gradient of all batches together, in which unbiased errors average out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from convergence import DEFAULT, Setting
from llama import Llama, LlamaConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from train_llama import standard_library, windows
from training import Batch, Optimization, runs_of, train

import lpcompile as lp


@dataclass(frozen=True)
class Cost:
    """One recipe. loss: rise of the held-out loss in nats; the others are relative errors of gradients: `one` of a batch,
    `all_` of all batches together, by what is converted."""

    recipe: str
    loss: float
    forward_one: float
    backward_one: float
    whole_one: float
    forward_all: float
    backward_all: float
    whole_all: float


def halves(recipe: lp.Recipe) -> dict[str, lp.Recipe]:
    """The recipe with every block converted: whole, only forward, only backward (which then quantises itself what it would
    have taken from forward's codes)."""
    recipe = replace(recipe, keep_last=0.0)
    dgrad, wgrad = (gemm and replace(gemm, codes=False) for gemm in (recipe.dgrad, recipe.wgrad))
    return {
        "forward": replace(recipe, dgrad=None, wgrad=None),
        "backward": replace(recipe, fprop=None, dgrad=dgrad, wgrad=wgrad),
        "whole": recipe,
    }


def measured(model: Llama, step: Callable[..., Tensor], batches: Sequence[Batch]) -> tuple[float, list[Tensor]]:
    """Mean loss, and for each batch the gradient of all matrices inside the blocks as one vector."""
    losses, gradients = [], []
    for index, batch in enumerate(batches):
        model.zero_grad()
        torch.manual_seed(index)  # stochastic recipes draw from here
        loss = step(*batch)
        loss.backward()
        losses.append(loss.item())
        parts = [p.grad.flatten() for p in model.layers.parameters() if p.dim() == 2 and p.grad is not None]
        gradients.append(torch.cat(parts))
    return statistics.fmean(losses), gradients


def error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, float]:
    """Relative error of each gradient, on average, and of their sum."""
    one = statistics.fmean(((f - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True))
    total = sum(exact, torch.zeros(()))
    return one, ((sum(found, torch.zeros(())) - total).norm() / total.norm()).item()


def cost(name: str, model: Llama, batches: Sequence[Batch], exact: tuple[float, list[Tensor]]) -> Cost:
    """Measures one recipe at the model's weights."""
    errors: dict[str, float] = {}
    loss = 0.0
    for half, recipe in halves(lp.find_recipe(name)).items():
        torch.compiler.reset()
        options: dict[str, Any] = {"recipe": recipe, "executor": "reference", "always": True}
        loss, gradients = measured(model, torch.compile(model, backend="lowprec", options=options), batches)
        errors[f"{half}_one"], errors[f"{half}_all"] = error(gradients, exact[1])
    return Cost(name, loss - exact[0], **errors)


def table(costs: Sequence[Cost]) -> Table:
    """The costs for a terminal."""
    shown = Table(box=SIMPLE_HEAD, title="At the same trained weights: loss, and relative error of the gradient", padding=0)
    for index, heading in enumerate(HEADINGS):
        shown.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for each in costs:
        shown.add_row(*_cells(each))
    return shown


HEADINGS = ("recipe", "loss", "forward", "backward", "both", "forward, all", "backward, all", "both, all")


def _cells(each: Cost) -> tuple[str, ...]:
    name, loss, *errors = asdict(each).values()
    return name, f"{loss:+.5f}", *(f"{value:.1%}" for value in errors)


def main(argv: Sequence[str] | None = None) -> list[Cost]:
    """Trains, measures every recipe, prints the table and writes `rounding.json` and `rounding.md` into `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=DEFAULT, help="names or texts, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("out/rounding"))
    for name in ("steps", "hidden", "layers", "batch", "seq", "heldout", "learning_rate"):
        value = getattr(Setting(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args(argv)
    console = Console()
    train_bytes, heldout_bytes = standard_library()
    torch.manual_seed(0)
    model = Llama(LlamaConfig.sized(args.hidden, args.layers, seq=args.seq))
    batches = windows(train_bytes, args.steps, args.batch, args.seq, 0)
    train("fp32", list(model.parameters()), model, batches, Optimization(args.learning_rate), console)
    heldout = windows(heldout_bytes, args.heldout, args.batch, args.seq, 0)
    exact = measured(model, model, heldout)
    names = [name for name in runs_of([args.recipes])[1:] if name != "none"]
    costs = [cost(name, model, heldout, exact) for name in track(names, "recipes", console=console)]
    console.print(f"held-out loss without a recipe: {exact[0]:.4f}", table(costs))
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"setting": {**vars(args), "out": str(args.out)}, "loss": exact[0], "costs": [asdict(each) for each in costs]}
    (args.out / "rounding.json").write_text(json.dumps(report, indent=2) + "\n")
    rows = [HEADINGS, ("---",) * len(HEADINGS), *map(_cells, costs)]
    (args.out / "rounding.md").write_text("".join(f"| {' | '.join(row)} |\n" for row in rows))
    return costs


if __name__ == "__main__":
    main()
