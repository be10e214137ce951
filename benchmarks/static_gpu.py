"""What one linear layer costs on each GPU target, forward and backward: launches, bytes, predicted time against bf16.

    python benchmarks/static_gpu.py --targets sm_90 --recipes fp8-rowwise,halo2-int8,deepseek

Nothing runs: the kernels are those that the pipeline makes of the layer, and their cost is `lpcompile.kernel_cost`'s. `x min`
is bytes against the least that could do; `casts` the same for the launches that quantise. `unfused` is the flow of a library
that swaps modules: a pass for each quantisation and orientation, products that read what these wrote.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lpcompile.kernel import CastKernel, DecodeKernel, GemmKernel, Kernel, RequantKernel, parse
from lpcompile.kernel_cost import kernel_cost, total
from lpcompile.layer import layer_kernels
from lpcompile.target import Target, find_target

# Out- and in-features of Llama-8B's linear layers.
SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
TOKENS = (8192, 16384)
RECIPES = (
    "fp8-tensorwise",
    "fp8-rowwise",
    "deepseek",
    "mxfp8",
    "int8-rowwise",
    "halo2-int8",
    "mxfp4",
    "nvfp4",
    "quartet",
    "quartet2",
)
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
_PLAIN = (("gemm hp @ hp' -> bf16", (0, 1, 2)), ("gemm hp @ hp -> bf16", (0, 2, 1)), ("gemm hp' @ hp -> bf16", (1, 2, 0)))

Launch = tuple[Kernel, tuple[int, ...]]


@dataclass(frozen=True)
class Row:
    """One layer under one recipe. bytes in units of 1e9, time in microseconds; the ratios are to the least bytes (all
    launches, those that quantise) and to bf16's time (speed)."""

    target: str
    recipe: str
    tokens: int
    out_features: int
    in_features: int
    launches: int
    gigabytes: float
    against_minimum: float
    casts_against_minimum: float
    microseconds: float
    bf16: float
    speed: float
    unfused_gigabytes: float
    unfused_speed: float
    kernels: list[str]


@functools.cache
def kernels(recipe: str, target: str, tokens: int, n: int, k: int) -> tuple[Launch, ...]:
    """The launches of forward and backward."""
    return tuple((each.kernel, each.sizes) for each in layer_kernels(recipe, target, (tokens, n, k)))


def bf16(tokens: int, n: int, k: int) -> list[Launch]:
    """The three products without us."""
    sizes = (tokens, n, k)
    return [(parse(text), tuple(sizes[i] for i in order)) for text, order in _PLAIN]


def unfused(launches: Sequence[Launch]) -> list[Launch]:
    """The same with a launch for each quantisation and orientation, and no neighbour inside."""
    found: list[Launch] = []
    for kernel, sizes in launches:
        if isinstance(kernel, CastKernel | RequantKernel):
            found += [(replace(kernel, outputs=(output,)), sizes) for output in kernel.outputs]
        else:
            found.append((kernel, sizes))
    return found


def measure(recipe: str, target: Target, tokens: int, n: int, k: int) -> Row:
    """One row of the table."""
    launches = kernels(recipe, target.name, tokens, n, k)
    ours, apart, plain = (total(each, target) for each in (launches, unfused(launches), bf16(tokens, n, k)))
    costs = [kernel_cost(*each, target) for each in launches if not isinstance(each[0], GemmKernel | DecodeKernel)]
    return Row(
        target.name,
        recipe,
        tokens,
        n,
        k,
        ours.launches,
        float(ours.bytes) / 1e9,
        float(ours.bytes / ours.minimum),
        max(float(cost.moved / cost.minimum) for cost in costs),
        float(ours.time),
        float(plain.time),
        float(plain.time / ours.time),
        float(apart.bytes) / 1e9,
        float(plain.time / apart.time),
        [f"{kernel} {'x'.join(map(str, sizes))}" for kernel, sizes in launches],
    )


def table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal."""
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    headings = (
        "target",
        "recipe",
        "tokens",
        "out x in",
        "launches",
        "GB",
        "x min",
        "casts",
        "us",
        "x bf16",
        "unfused GB",
        "x bf16",
    )
    for index, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if index > 1 else "left", no_wrap=True)
    for row in rows:
        shown.add_row(
            row.target,
            row.recipe,
            str(row.tokens),
            f"{row.out_features}x{row.in_features}",
            str(row.launches),
            f"{row.gigabytes:.2f}",
            f"{row.against_minimum:.2f}",
            f"{row.casts_against_minimum:.2f}",
            f"{row.microseconds:.0f}",
            f"{row.speed:.2f}",
            f"{row.unfused_gigabytes:.2f}",
            f"{row.unfused_speed:.2f}",
        )
    return shown


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Prints the table, writes `static_gpu.json` and returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES), help="out x in features")
    parser.add_argument("--out", type=Path, default=Path("out/static_gpu"))
    args = parser.parse_args(argv)
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    rows = [
        measure(recipe, find_target(target), tokens, n, k)
        for target in args.targets.split(",")
        for recipe in args.recipes.split(",")
        for tokens in map(int, args.tokens.split(","))
        for n, k in shapes
    ]
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table(rows))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "static_gpu.json"
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    console.print(f"wrote {path}")
    return rows


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
