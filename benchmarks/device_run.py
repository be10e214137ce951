"""How `device.py` measures: cases in worker processes that may die, settings that travel to them, clocks, compiled contenders.

A part is a list of cases and a function that turns one case into a row. A worker runs the cases of a part one after the other
and writes each row as soon as it is known; where it dies or hangs, the case it was at is marked and a new worker goes on.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "bf16"
TORCHAO = {"torchao tensorwise": "tensorwise", "torchao rowwise": "rowwise"}
# What the measurements are about first: a part that runs out of time loses the end of the list.
RECIPES = (
    "fp8-rowwise",
    "fp8-tensorwise",
    "halo2-int8",
    "deepseek",
    "int8-rowwise",
    "mxfp8",
    "nvfp4",
    "quartet2",
    "quartet",
    "mxfp4",
)

Case = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What every part is told. budget: seconds a part may take; minutes: of training per recipe, in bf16's time; graphs: under
    CUDA graphs; always: also where low precision is predicted slower; torchao: a folder or wheel to import it from;
    seeds: of training; head: the output head is converted too, by everyone; match: only cases in whose names this is."""

    out: str
    recipes: tuple[str, ...] = RECIPES
    tokens: tuple[int, ...] = (8192, 16384)
    budget: float = 510.0
    minutes: float = 1.0
    quick: bool = False
    dry: bool = False
    graphs: bool = False
    always: bool = False
    profile: bool = False
    torchao: str = ""
    seeds: int = 1
    head: bool = False
    match: str = ""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @staticmethod
    def read(text: str) -> Settings:
        known: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(text).items()}
        return Settings(**known)

    def text(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Part:
    """cases: what there is to do, each with a `name`. run: one case, given the rows before it. lines: the short table.

    fresh: each case in a process and with caches of its own, so that compilation is cold and memory its own.
    limit: seconds that one case may take. jobs: workers at a time. warm: so many workers at a time first run every case with
    `warm` set, which compiles what it needs into the caches and measures nothing. inside: no worker, because a case has
    processes of its own, keeps to the budget itself and loses no row.
    """

    name: str
    cases: Callable[[Settings], list[Case]]
    run: Callable[[Case, Settings, list[Row]], Row]
    lines: Callable[[list[Row]], list[tuple[str, ...]]]
    fresh: bool = False
    limit: float = 180.0
    jobs: int = 1
    warm: int = 0
    inside: bool = False


RUNNING: set[subprocess.Popen[Any]] = set()


def end(*_: object) -> None:
    """Ends this process and its workers, on a signal: nobody stays behind on the device."""
    for process in tuple(RUNNING):
        process.kill()
    # Threads that watch workers would start new ones.
    os._exit(143)


# ---- workers -----------------------------------------------------------------------------------------------------


def run_part(part: Part, settings: Settings, script: Path) -> list[Row]:
    """All rows of a part, those of cases that failed or were not reached with an `error`."""
    deadline = time.monotonic() + settings.budget
    folder = Path(settings.out) / part.name
    folder.mkdir(parents=True, exist_ok=True)
    cases = [case for case in part.cases(settings) if settings.match in case["name"]]
    if not cases:
        print(f"  {part.name}: no case has {settings.match!r} in its name", flush=True)
    if part.warm and not settings.dry and os.environ.get("LPCOMPILE_AUTOTUNE") != "0":
        half = time.monotonic() + settings.budget / 2
        _spread(part, settings, [{**case, "warm": True} for case in cases], part.warm, (folder / "warm", half, script))
    if part.inside:
        rows = [{**case, **part.run(case, settings, [])} for case in cases]
    else:
        rows = _spread(part, settings, cases, 1 if settings.dry else part.jobs, (folder, deadline, script))
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    return rows


def _spread(part: Part, settings: Settings, cases: list[Case], jobs: int, where: tuple[Path, float, Path]) -> list[Row]:
    """The rows of cases that several workers share, in the order of the cases."""
    folder, deadline, script = where
    hands = [(cases[index::jobs], folder / str(index) if jobs > 1 else folder) for index in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        dealt = list(pool.map(lambda hand: _drain(part, settings, hand[0], (hand[1], deadline, script)), hands))
    rows: list[Row] = [{}] * len(cases)
    for index, found in enumerate(dealt):
        rows[index::jobs] = found
    return rows


def _drain(part: Part, settings: Settings, cases: list[Case], where: tuple[Path, float, Path]) -> list[Row]:
    """One worker after the other until there is a row for each case."""
    folder, deadline, script = where
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    while len(rows) < len(cases):
        rest = cases[len(rows) :]
        if deadline - time.monotonic() < 5:
            return rows + [{"name": case["name"], "error": "not reached in time"} for case in rest]
        batch = rest[:1] if part.fresh else rest
        found, died = _worker(part, settings, batch, rows, folder, deadline, script)
        rows += found
        if len(found) < len(batch):
            rows.append({"name": batch[len(found)]["name"], "error": died})
        (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    return rows


def _worker(
    part: Part, settings: Settings, cases: list[Case], before: list[Row], folder: Path, deadline: float, script: Path
) -> tuple[list[Row], str]:
    """The rows that one process finished, and why it ended early."""
    order, answers = folder / f"order{len(before)}.json", folder / f"answers{len(before)}.jsonl"
    order.write_text(json.dumps({"settings": settings.text(), "cases": cases, "before": before}))
    answers.write_text("")
    environment = {**os.environ}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches, (folder / f"log{len(before)}.txt").open("w") as log:
        if part.fresh:
            names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "LPCOMPILE_CACHE": "lpcompile"}
            environment |= {key: str(Path(caches) / name) for key, name in names.items()}
        command = [sys.executable, str(script), "--worker", part.name, str(order), str(answers)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        RUNNING.add(process)
        died = _watch(process, answers, part, deadline)
        RUNNING.discard(process)
    # A line that was cut short belongs to the case that failed.
    rows = [json.loads(line) for line in answers.read_text().split("\n")[:-1]]
    if died is None:
        died = f"the process ended with status {process.returncode}: {_tail(folder / f'log{len(before)}.txt')}"
    return rows, died


def _watch(process: subprocess.Popen[bytes], answers: Path, part: Part, deadline: float) -> str | None:
    """Waits for a worker and shows its rows as they come; ends it where a case takes too long. Returns why it was ended."""
    shown = 0
    while True:
        try:
            process.wait(timeout=0.5)
            ended = True
        except subprocess.TimeoutExpired:
            ended = False
        *lines, _ = answers.read_text().split("\n")
        for row in map(json.loads, lines[shown:]):
            if not row.get("warm"):
                print(f"  {part.name}: {summary(row)}", flush=True)
        shown = len(lines)
        if ended:
            return None
        # The first case also pays for imports.
        stuck = time.time() - answers.stat().st_mtime > part.limit
        if stuck or time.monotonic() > deadline:
            process.kill()
            process.wait()
            return f"more than {part.limit:.0f} s" if stuck else "out of time"


def serve(part: Part, order: Path, answers: Path) -> None:
    """What a worker does."""
    told = json.loads(order.read_text())
    settings, before = Settings.read(told["settings"]), told["before"]
    prepare(settings)
    with answers.open("a") as file:
        for case in told["cases"]:
            started = time.perf_counter()
            row: Row = {"name": case["name"], **case}
            try:
                row |= part.run(case, settings, before)
            except (
                RuntimeError,
                ValueError,
                TypeError,
                AttributeError,
                ImportError,
                AssertionError,
                KeyError,
                OSError,
            ) as error:
                print(f"{case['name']}: {error!r}", flush=True)
                row["error"] = f"{type(error).__name__}: {str(error).strip()[:400]}"
                sys.excepthook(type(error), error, error.__traceback__)
            row["seconds"] = round(time.perf_counter() - started, 1)
            before.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            if "CUDA error" in row.get("error", ""):
                # Nothing works in a process whose context is lost; a new one takes over.
                os._exit(3)


def prepare(settings: Settings) -> None:
    """Paths, and limits that many contenders in one process need."""
    if settings.torchao:
        sys.path.insert(0, settings.torchao)
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 10000
    torch.set_float32_matmul_precision("high")


def unpack_wheel(wheel: Path) -> Path:
    """A folder to import a wheel from: it holds files that have to lie on a disk."""
    if wheel.is_dir():
        return wheel
    folder = Path(tempfile.gettempdir()) / f"lpcompile-{wheel.stem}"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _tail(path: Path) -> str:
    return path.read_text(errors="replace").strip()[-400:].replace("\n", " | ")


def summary(row: Row) -> str:
    """One row on one line."""
    shown = {k: v for k, v in row.items() if k not in ("name", "detail", "profile") and not isinstance(v, (dict, list))}
    return f"{row['name']}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())


# ---- clocks ------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Waits for what was queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int = 20, cold: bool = False) -> float:
    """Median time of a call that was warmed up, each repeat between two events of the device.

    cold: as schedules are timed, with nothing of its inputs in the L2 and behind work that hides what a launch costs the host.
    """
    if device.type == "cpu":
        times = []
        for _ in range(min(repeats, 3)):
            started = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times)
    if cold:
        from lpcompile.codegen import tune

        return tune.microseconds(call, device, repeats)[0] / 1e3
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in marks:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return float(statistics.median(start.elapsed_time(end) for start, end in marks))


def in_turns(
    theirs: Callable[[], Any], ours: Callable[[], Any], device: torch.device, turns: int = 3, repeats: int = 10
) -> tuple[float, float, float]:
    """(theirs, ours) in milliseconds and the median of their ratio over turns that follow each other."""
    for call in (theirs, ours):
        for _ in range(3):
            call()
    pairs = [(milliseconds(theirs, device, repeats), milliseconds(ours, device, repeats)) for _ in range(turns)]
    ratio = statistics.median(a / b for a, b in pairs)
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio


# ---- contenders --------------------------------------------------------------------------------------------------


def contenders(settings: Settings) -> list[str]:
    """bf16, torchao where it can be imported, ours."""
    found = [BASELINE]
    if settings.torchao or _importable("torchao"):
        found += list(TORCHAO)
    return found + list(settings.recipes)


def _importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def compiled(model: nn.Module, contender: str, settings: Settings) -> Any:
    """The model as a contender compiles it."""
    graphs = {"triton.cudagraphs": True} if settings.graphs else {}
    if contender == BASELINE or contender in TORCHAO:
        if contender in TORCHAO:
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training

            def wanted(module: nn.Module, name: str) -> bool:
                sizes = isinstance(module, nn.Linear) and module.in_features % 16 == module.out_features % 16 == 0
                return sizes and (settings.head or "lm_head" not in name)

            config = Float8LinearConfig.from_recipe_name(TORCHAO[contender])
            model = convert_to_float8_training(model, config=config, module_filter_fn=wanted)
        backend = "eager" if settings.dry else "inductor"
        how: dict[str, Any] = {"options": graphs} if graphs else {}
        return torch.compile(model, dynamic=False, backend=backend, **how)
    from lpcompile.backend import lowprec
    from lpcompile.recipes import find_recipe

    recipe = find_recipe(contender)
    if settings.head:
        recipe = replace(recipe, keep=tuple(glob for glob in recipe.keep if "lm_head" not in glob))
    options: dict[str, Any] = {"recipe": recipe, "always": settings.always, "inductor": graphs}
    if settings.dry:
        options |= {"executor": "reference", "always": True}
    return torch.compile(model, dynamic=False, backend=lowprec, options=options)


def launches() -> dict[str, Any]:
    """What this process's generated kernels came to: schedules with their times, and kernels that run as the reference."""
    from lpcompile.codegen import launch, tune

    return {
        "fallbacks": dict(launch.FALLBACKS),
        "choices": {f"{kernel} {sizes}": asdict(choice) for (kernel, sizes), choice in tune._CHOICES.items()},
    }


def profiled(call: Callable[[], Any], settings: Settings, rows: int = 25) -> list[list[Any]]:
    """Microseconds and count of each kernel of one call, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    if settings.dry:
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    found = [[e.key[:120], round(e.self_device_time_total, 1), e.count] for e in seen.key_averages()]
    return sorted(found, key=lambda each: -each[1])[:rows]


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """GiB that tensors took at most inside the block."""
    found = {"peak_gib": 0.0}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30


def randn(*shape: int, settings: Settings, scale: float = 1.0) -> Tensor:
    """bf16 numbers on the device."""
    return (torch.randn(*shape, device=settings.device) * scale).to(torch.bfloat16)


def columns(lines: Sequence[tuple[str, ...]]) -> str:
    """A table of text: the first line holds headings; the first column is left-aligned."""
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(max(map(len, lines)))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=False)))
        for line in lines
    )
