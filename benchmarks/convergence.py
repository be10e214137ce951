"""Final loss of each recipe against bf16: paired runs of the example Llama on Python's own source, over several seeds.

    python benchmarks/convergence.py --recipes none,fp8-rowwise,quartet2 --steps 200 --seeds 5 --repeats 3 --out out/convergence

Runs of one seed start from the same weights and read the same batches; the interval is Student's over the seeds. The held-out
loss is that of the compiled model as it runs under its recipe. Finished runs are kept in `--out` and found again: a study that
was cut short, or that gets more seeds or recipes, goes on.

Training is chaotic: two runs that differ in one rounding of the first weights end with different losses. `--repeats` trains the
bf16 model again from such weights; gaps are then taken to the mean of a seed's bf16 runs, and how far one of them lies from
another is printed: a gap that is not larger is none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from llama import Llama, LlamaConfig
from train_llama import standard_library, windows
from training import BASELINE, DTYPES, Batch, Optimization, Outcome, compiled, plot_losses, runs_of, train

import lpcompile as lp

REPEAT = BASELINE + "~"
"""What the names of bf16 runs from perturbed weights begin with."""

DEFAULT = "none,fp8-rowwise,int8-rowwise,halo2-int8,mxfp4,quartet,nvfp4,quartet2"


@dataclass(frozen=True)
class Setting:
    """What every run of a study has in common. batch x seq: bytes a step; heldout: batches."""

    steps: int = 200
    hidden: int = 256
    layers: int = 3
    batch: int = 8
    seq: int = 128
    learning_rate: float = 2e-3
    dtype: str = "bf16"
    executor: str = "inductor"
    heldout: int = 16


@dataclass(frozen=True)
class Run:
    """One finished run. losses: one a step; heldout: under the recipe; weights: of the trained weights without it."""

    recipe: str
    seed: int
    losses: list[float]
    heldout: float
    weights: float


@dataclass(frozen=True)
class Gap:
    """A recipe beside bf16. loss: mean held-out loss; gap: mean of the paired differences, in nats; low, high: its 95 %
    interval (equal to the gap where there is one seed); relative: the gap as a share of the bf16 loss; errors: the gap in
    standard errors, by the noise of repeated bf16 runs, None without them."""

    recipe: str
    seeds: int
    loss: float
    gap: float
    low: float
    high: float
    relative: float
    errors: float | None = None


def one_run(recipe: str, seed: int, setting: Setting, console: Console) -> Run:
    """Trains under one recipe from one seed."""
    train_bytes, heldout_bytes = standard_library()
    batches = windows(train_bytes, setting.steps, setting.batch, setting.seq, seed)
    heldout = windows(heldout_bytes, setting.heldout, setting.batch, setting.seq, 0)
    torch.manual_seed(seed)
    model = Llama(LlamaConfig.sized(setting.hidden, setting.layers, seq=setting.seq)).to(DTYPES[setting.dtype])
    if recipe.startswith(REPEAT):
        perturb(model, int(recipe.removeprefix(REPEAT)))
    step = compiled(model, BASELINE if recipe.startswith(REPEAT) else recipe, setting.executor)
    torch.manual_seed(seed)  # stochastic recipes draw from here
    losses, _ = train(
        f"{recipe} #{seed}", list(model.parameters()), step, batches, Optimization(setting.learning_rate), console
    )
    return Run(recipe, seed, losses, _mean_loss(step, heldout), _mean_loss(model, heldout))


def perturb(model: nn.Module, seed: int) -> None:
    """Each weight one rounding of its format up or down."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            sign = torch.randint(2, weight.shape, generator=generator) * 2 - 1
            weight.mul_((1 + sign * torch.finfo(weight.dtype).eps).to(weight.dtype))


def _mean_loss(model: object, batches: Sequence[Batch]) -> float:
    assert callable(model)
    with torch.no_grad():
        return statistics.fmean(model(*batch).item() for batch in batches)


def gaps(runs: Mapping[tuple[str, int], Run]) -> list[Gap]:
    """Each recipe's gap to the mean bf16 run of the same seed, best first after the baseline. Needs the baseline for every
    seed."""
    from scipy.stats import ttest_1samp

    recipes = list(dict.fromkeys(recipe for recipe, _ in runs if not recipe.startswith(REPEAT)))
    bf16 = {seed: _repeats(runs, seed) for seed in {seed for _, seed in runs}}
    spread = noise(runs)
    found = []
    for recipe in recipes:
        seeds = [seed for name, seed in runs if name == recipe]
        wanted = [statistics.fmean(bf16[seed]) for seed in seeds]
        pairs = list(zip(wanted, wanted if recipe == BASELINE else [runs[recipe, seed].heldout for seed in seeds], strict=True))
        differences = [heldout - bf16 for bf16, heldout in pairs]
        gap = low = high = statistics.fmean(differences)
        if len(set(differences)) > 1:
            low, high = ttest_1samp(differences, 0.0).confidence_interval(0.95)
        loss = statistics.fmean(heldout for _, heldout in pairs)
        errors = spread and gap / (spread * (1 / len(seeds) + 1 / sum(map(len, bf16.values()))) ** 0.5)
        found.append(Gap(recipe, len(seeds), loss, gap, float(low), float(high), gap / (loss - gap), errors))
    return sorted(found, key=lambda g: (g.recipe != BASELINE, g.gap))


def _repeats(runs: Mapping[tuple[str, int], Run], seed: int) -> list[float]:
    return [run.heldout for (name, of), run in runs.items() if of == seed and (name == BASELINE or name.startswith(REPEAT))]


def noise(runs: Mapping[tuple[str, int], Run]) -> float | None:
    """Standard deviation of the held-out loss among bf16 runs of one seed, pooled over the seeds; None without repeats."""
    groups = [_repeats(runs, seed) for seed in {seed for _, seed in runs}]
    degrees = sum(len(group) - 1 for group in groups)
    squares = sum((loss - statistics.fmean(group)) ** 2 for group in groups for loss in group)
    return (squares / degrees) ** 0.5 if degrees else None


def _file(folder: Path, recipe: str, seed: int, setting: Setting) -> Path:
    """Where a run is kept: its name changes with everything that shapes it but lpcompile's own code."""
    text = json.dumps([asdict(setting), "" if recipe.startswith(BASELINE) else str(lp.find_recipe(recipe)), torch.__version__])
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return folder / "runs" / f"{''.join(c if c.isalnum() or c in '-.' else '_' for c in recipe)[:60]}-{seed}-{digest}.json"


def study(
    recipes: Sequence[str], seeds: int, setting: Setting, folder: Path, console: Console, repeats: int = 0
) -> dict[tuple[str, int], Run]:
    """Every recipe under every seed, seed by seed, those that `folder` holds already read from there."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    runs: dict[tuple[str, int], Run] = {}
    names = [*runs_of(recipes), *(f"{REPEAT}{index}" for index in range(1, repeats + 1))]
    for seed in range(seeds):
        for recipe in names:
            path = _file(folder, recipe, seed, setting)
            if not path.exists():
                aside = path.with_suffix(".part")
                aside.write_text(json.dumps(asdict(one_run(recipe, seed, setting, console))))
                aside.replace(path)
            runs[recipe, seed] = Run(**json.loads(path.read_text()))
    return runs


def table(found: Sequence[Gap]) -> Table:
    """The gaps for a terminal."""
    shown = Table(box=SIMPLE_HEAD, title="Held-out loss against bf16 (inductor), paired over seeds")
    for index, heading in enumerate(HEADINGS):
        shown.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for gap in found:
        shown.add_row(*_cells(gap))
    return shown


HEADINGS = ("recipe", "seeds", "loss", "gap", "95 %", "share", "SE")


def _cells(gap: Gap) -> tuple[str, ...]:
    if gap.recipe == BASELINE:
        return gap.recipe, str(gap.seeds), f"{gap.loss:.4f}", "", "", "", ""
    errors = "" if gap.errors is None else f"{gap.errors:+.1f}"
    interval = f"{gap.low:+.3f} .. {gap.high:+.3f}"
    return gap.recipe, str(gap.seeds), f"{gap.loss:.4f}", f"{gap.gap:+.4f}", interval, f"{gap.relative:+.2%}", errors


def markdown(found: Sequence[Gap]) -> str:
    """The same table for a document."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *map(_cells, found)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write(runs: Mapping[tuple[str, int], Run], found: Sequence[Gap], setting: Setting, folder: Path) -> list[Path]:
    """`convergence.json`, `convergence.md` and `convergence.png` (mean curves over the seeds) in `folder`."""
    report = {
        "setting": asdict(setting),
        "torch": torch.__version__,
        "noise": noise(runs),
        "gaps": [asdict(gap) for gap in found],
    }
    report["losses"] = {f"{recipe} #{seed}": [run.heldout, run.weights] for (recipe, seed), run in runs.items()}
    paths = [folder / f"convergence.{ending}" for ending in ("json", "md", "png")]
    paths[0].write_text(json.dumps(report, indent=2) + "\n")
    paths[1].write_text(markdown(found))
    curves = []
    for recipe in dict.fromkeys(name for name, _ in runs if not name.startswith(REPEAT)):
        losses = [run.losses for (name, _), run in runs.items() if name.partition("~")[0] == recipe]
        curves.append(Outcome(recipe, [statistics.fmean(step) for step in zip(*losses, strict=True)], 0.0))
    plot_losses(curves, paths[2])
    return paths


def main(argv: Sequence[str] | None = None) -> list[Gap]:
    """Runs the study and returns its gaps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=DEFAULT, help="names or texts, separated by commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=0, help="more bf16 runs a seed, from weights one rounding away")
    parser.add_argument("--out", type=Path, default=Path("out/convergence"))
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = vars(parser.parse_args(argv))
    console = Console()
    setting = Setting(**{name: args[name] for name in asdict(Setting())})
    runs = study([args["recipes"]], args["seeds"], setting, args["out"], console, args["repeats"])
    found = gaps(runs)
    console.print(table(found))
    if (spread := noise(runs)) is not None:
        console.print(f"bf16 runs of one seed that differ in the first rounding: standard deviation {spread:.4f}")
    for path in write(runs, found, setting, args["out"]):
        console.print(f"wrote {path}")
    return found


if __name__ == "__main__":
    main()
