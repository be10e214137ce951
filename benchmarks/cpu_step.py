"""Time of a training step and of compiling it on a CPU: the example Llama without us and under each recipe.

    python benchmarks/cpu_step.py --hidden 512,1024 --dtype bf16,fp32

Every variant is a process of its own. Its first process starts with an empty cache folder (cold compile), its second
one with what the first left there (warm compile). Steps are timed in turns: a few steps of Inductor without us, a few
of the recipe, again and again; the ratio is the median over the turns, each of which saw the same machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

BASELINE = "inductor"
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@dataclass(frozen=True)
class Case:
    """What one process trains."""

    variant: str
    dtype: str
    hidden: int
    layers: int
    batch: int
    seq: int


@dataclass(frozen=True)
class Row:
    """One line of the table. step_ms: median step; ratio: to the baseline's; error: why there are no numbers."""

    case: Case
    step_ms: float = math.nan
    ratio: float = math.nan
    cold_s: float = math.nan
    warm_s: float = math.nan
    error: str = ""


class WorkerError(RuntimeError):
    """A measured process ended early; the message holds the end of what it wrote."""


class Worker:
    """A process that compiles one case at once and then runs steps when told to."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.process, self.log = process, log
        self.compile_s = float(self._answer())

    def steps(self, count: int) -> list[float]:
        """Milliseconds of each of the next `count` steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        milliseconds: list[float] = self._answer()
        return milliseconds

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise WorkerError(self.log.read().strip()[-800:] or f"exit status {self.process.returncode}")
        return json.loads(line)


@contextmanager
def worker(case: Case, cache: Path) -> Iterator[Worker]:
    """A Worker that has compiled its case; its process ends with the block."""
    path = os.pathsep.join(filter(None, (str(EXAMPLES), os.environ.get("PYTHONPATH"))))
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(asdict(case))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": path},
        ) as process,
    ):
        try:
            yield Worker(process, log)
        finally:
            assert process.stdin is not None
            process.stdin.close()  # it leaves its loop and ends; Popen's own exit waits for that


def serve(case: Case) -> None:
    """What the measured process does: compiles on the first step, then answers each line `N` with N step times."""
    import torch
    from llama import Llama, LlamaConfig
    from training import compiled

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a compiler prints must not mix with the answers
    torch.manual_seed(0)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[case.dtype]
    model = Llama(LlamaConfig.sized(case.hidden, case.layers, seq=case.seq)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(256, (case.batch, case.seq + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    model_step = compiled(model, case.variant, "inductor")

    def step() -> float:
        started = time.perf_counter()
        model_step(inputs, targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return 1e3 * (time.perf_counter() - started)

    print(step() / 1e3, file=answers, flush=True)
    step()  # the second step still allocates
    for line in sys.stdin:
        print(json.dumps([step() for _ in range(int(line))]), file=answers, flush=True)


def measure(case: Case, baseline: Worker, cache: Path, turns: int, steps: int) -> Row:
    """Cold compile, warm compile, and steps in turns with the baseline's."""
    try:
        with worker(case, cache) as cold:
            cold_s = cold.compile_s
        with worker(case, cache) as own:
            ours: list[float] = []
            ratios: list[float] = []
            for _ in range(turns):
                theirs = statistics.median(baseline.steps(steps))
                ours.append(statistics.median(own.steps(steps)))
                ratios.append(ours[-1] / theirs)
            return Row(case, statistics.median(ours), statistics.median(ratios), cold_s, own.compile_s)
    except WorkerError as error:
        return Row(case, error=str(error))


def compare(cases: Sequence[Case], turns: int, steps: int, progress: Progress) -> list[Row]:
    """The rows of one model, the first of which is the baseline."""
    with tempfile.TemporaryDirectory(prefix="cpu_step_") as folder:
        caches = [Path(folder) / str(index) for index in range(len(cases))]
        task = progress.add_task(f"{cases[0].dtype} hidden {cases[0].hidden}", total=len(cases))
        with worker(cases[0], caches[0]) as cold:
            cold_s = cold.compile_s
        with worker(cases[0], caches[0]) as baseline:
            times = baseline.steps(turns * steps)
            rows = [Row(cases[0], statistics.median(times), 1.0, cold_s, baseline.compile_s)]
            progress.advance(task)
            for case, cache in zip(cases[1:], caches[1:], strict=True):
                rows.append(measure(case, baseline, cache, turns, steps))
                progress.advance(task)
    return rows


def table(rows: Sequence[Row]) -> Table:
    """One line a variant; each ratio is to Inductor without us, for the same model."""
    shown = Table(title="Step and compile time on this CPU; inductor is the run without us", box=SIMPLE_HEAD, padding=0)
    for heading in ("dtype", "hidden", "run", "ms/step", "ratio", "cold s", "ratio", "warm s", "ratio"):
        shown.add_column(heading, justify="left" if heading in {"dtype", "run"} else "right", no_wrap=True)
    for row in rows:
        baseline = next(r for r in rows if (r.case.dtype, r.case.hidden) == (row.case.dtype, row.case.hidden))
        cells = [row.case.dtype, str(row.case.hidden), row.case.variant]
        if row.error:
            shown.add_row(*cells, "failed")
            continue
        cells += [f"{row.step_ms:.1f}", f"{row.ratio:.2f}x"]
        cells += [f"{row.cold_s:.1f}", f"{row.cold_s / baseline.cold_s:.2f}x"]
        cells += [f"{row.warm_s:.1f}", f"{row.warm_s / baseline.warm_s:.2f}x"]
        shown.add_row(*cells)
    return shown


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", help="recipes, with commas (default: all)")
    add("--dtype", default="bf16,fp32", help="bf16, fp32 or both, with a comma")
    add("--hidden", default="512,1024", help="widths, with commas")
    add("--layers", type=int, default=3)
    add("--batch", type=int, default=4)
    add("--seq", type=int, default=512)
    add("--turns", type=int, default=5)
    add("--steps", type=int, default=3, help="steps in a turn")
    add("--out", type=Path, default=Path("out/cpu_step.json"))
    add("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def variants(recipe: str | None) -> list[str]:
    """The baseline and the recipes to measure."""
    if recipe is None:
        from lpcompile.recipes import RECIPES

        return [BASELINE, *(known.name for known in RECIPES)]
    return [BASELINE, *filter(None, recipe.split(","))]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measures, prints one table, writes the JSON, and returns the rows."""
    args = parse(argv)
    if args.worker:
        serve(Case(**json.loads(args.worker)))
        return []
    console = Console()
    names = variants(args.recipe)
    rows: list[Row] = []
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for dtype in args.dtype.split(","):
            for hidden in map(int, args.hidden.split(",")):
                cases = [Case(name, dtype, hidden, args.layers, args.batch, args.seq) for name in names]
                rows += compare(cases, args.turns, args.steps, progress)
    console.print(table(rows))
    for row in rows:
        if row.error:
            console.print(f"{row.case.variant} ({row.case.dtype}, hidden {row.case.hidden}) failed:\n{row.error}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = [{"case": asdict(row.case), "error": row.error} if row.error else asdict(row) for row in rows]
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"wrote {args.out}")
    return rows


if __name__ == "__main__":
    main()
