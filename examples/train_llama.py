"""Trains a small Llama on the source of Python's standard library, once without us and once under each recipe.

    python examples/train_llama.py --recipe none,fp8-rowwise,deepseek,int8-rowwise

Every run starts from the same weights and reads the same batches, so a difference in loss is the recipe's. It prints
what becomes of each GEMM, then loss and ms/step side by side, and writes `loss.png` and `results.json` into `--out`.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from llama import Llama, LlamaConfig
from rich.console import Console
from torch import Tensor
from training import (
    BASELINE,
    DTYPES,
    Batch,
    Optimization,
    Outcome,
    compiled,
    default_dtype,
    results_table,
    runs_of,
    train,
    warm_median,
    write_results,
)

import lpcompile as lp


@functools.cache
def standard_library() -> tuple[Tensor, Tensor]:
    """The bytes of Python's own modules, as (training, held-out) vectors of uint8. One file in twenty is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(("site-packages/", "dist-packages/", "test/")):
            parts[zlib.crc32(name.encode()) % 20 == 0].append(path.read_bytes())
    train_bytes, heldout_bytes = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return train_bytes, heldout_bytes


def windows(data: Tensor, count: int, batch: int, seq: int, seed: int) -> list[Batch]:
    """`count` batches of (tokens, targets), each [batch, seq] int64, at random places that depend on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - seq, (count, batch), generator=generator)
    offsets = torch.arange(seq + 1)
    taken = [data[row[:, None] + offsets].long() for row in starts]
    return [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) for tokens in taken]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", action="append", help="recipe, or several with commas; repeatable (default: none,fp8-rowwise)")
    add("--executor", choices=("inductor", "reference"), default="inductor", help="who runs the rewritten graphs")
    add(
        "--explain",
        metavar="RECIPE",
        help="whose conversion table to print (default: the first but none; '' for no table)",
    )
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=8)
    add("--seq", type=int, default=256, help="tokens (bytes) in a sequence")
    add("--hidden", type=int, default=384, help="width, a multiple of 64")
    add("--layers", type=int, default=3)
    add(
        "--dtype",
        choices=tuple(DTYPES),
        default=default_dtype(),
        help="of the weights and of everything without a recipe (default: bf16, or fp32 on a CPU that multiplies no bf16)",
    )
    add("--learning-rate", type=float, default=1e-3)
    add("--seed", type=int, default=0, help="of the weights and of the order of the data")
    add("--out", type=Path, default=Path("out/train_llama"), help="folder for loss.png and results.json")
    args = parser.parse_args(argv)
    args.recipe = args.recipe or ["none,fp8-rowwise"]
    return args


def build(args: argparse.Namespace) -> Llama:
    """The model with the weights that the seed gives: the same ones for every run."""
    torch.manual_seed(args.seed)
    return Llama(LlamaConfig.sized(args.hidden, args.layers, seq=args.seq)).to(DTYPES[args.dtype])


def heldout_loss(model: Llama, batches: Sequence[Batch]) -> float:
    """Mean loss of the trained weights without a recipe: what training made of them, apart from how they are run."""
    with torch.no_grad():
        return statistics.fmean(model(*batch).item() for batch in batches)


def run(name: str, args: argparse.Namespace, data: tuple[list[Batch], list[Batch]], console: Console) -> Outcome:
    """Trains under one recipe."""
    model = build(args)
    step = compiled(model, name, args.executor)
    losses, times = train(name, list(model.parameters()), step, data[0], Optimization(args.learning_rate), console)
    return Outcome(name, losses, heldout_loss(model, data[1]), warm_median(times), times[0] / 1e3 if times else 0.0)


def explain(args: argparse.Namespace, names: Sequence[str], batch: Batch) -> None:
    """Prints what becomes of each GEMM under the chosen recipe."""
    recipe = args.explain
    if recipe is None:
        recipe = next((name for name in names if name not in (BASELINE, "none")), "")
    if recipe:
        lp.explain(build(args), recipe=recipe)(*batch).print()


def main(argv: Sequence[str] | None = None) -> list[Outcome]:
    """Runs the example and returns what came of each run, the baseline first."""
    args = parse(argv)
    console = Console()
    names = runs_of(args.recipe)
    train_bytes, heldout_bytes = standard_library()
    batches = windows(train_bytes, args.steps, args.batch, args.seq, args.seed)
    heldout = windows(heldout_bytes, 4, args.batch, args.seq, args.seed)
    size = sum(p.numel() for p in build(args).parameters())
    console.print(
        f"Llama with {size / 1e6:.1f} M parameters in {args.dtype}, {args.steps} steps of {args.batch} x {args.seq} "
        f"bytes out of {len(train_bytes) / 1e6:.1f} MB of Python source ({len(heldout_bytes) / 1e6:.1f} MB held out)"
    )
    explain(args, names, heldout[0])
    outcomes = [run(name, args, (batches, heldout), console) for name in names]
    console.print(results_table(outcomes, "Loss and speed; inductor is the run without us"))
    settings = {**vars(args), "out": str(args.out), "parameters": size}
    for path in write_results(outcomes, settings, args.out):
        console.print(f"wrote {path}")
    return outcomes


if __name__ == "__main__":
    main()
