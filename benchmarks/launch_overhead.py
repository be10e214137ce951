"""What a generated kernel costs on the host, on a GPU; and that its launch neither synchronises nor resists a CUDA graph.

    python benchmarks/launch_overhead.py --recipe fp8-rowwise --tokens 256,8192

For each kernel of one linear layer: microseconds of host time a call through the operator, of the generated launch alone, and
of the device (from a CUDA graph of 20 calls). Then a compiled layer's forward and backward, its kernels as opaque operators and
as kernels that Inductor sees (LPCOMPILE_REVEAL), each a process of its own: milliseconds a step and whether the gradients are
the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lpcompile.backend import lowprec
from lpcompile.codegen import launch
from lpcompile.codegen.example import Example, example, mismatch
from lpcompile.layer import layer_kernels
from lpcompile.target import find_target


def host_microseconds(run: Callable[[], Any], repeats: int = 200) -> float:
    """Median host time of a call, the device kept from being the bottleneck."""
    times: list[float] = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(times)


def graph_microseconds(run: Callable[[], Any], count: int = 20) -> float:
    """Device time of a call, replayed in a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            run()
    times: list[float] = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / count)
    return statistics.median(times)


def operator(call: Example) -> Callable[[], list[torch.Tensor]]:
    """The call through the dispatcher."""
    text = str(call.kernel)
    fused = torch.ops.lowprec.fused.default
    return lambda: fused(call.inputs, text, call.sizes, call.seed, call.uses, call.spins)


def measured(call: Example) -> list[str]:
    """Cells of one kernel: right, host time of operator and launch, device time."""
    run = operator(call)
    wrong = mismatch(call.kernel, run(), call.reference())
    torch.cuda.set_sync_debug_mode("error")
    run()
    torch.cuda.set_sync_debug_mode("default")
    direct = launch.last_launch(call)
    times = [
        host_microseconds(run),
        host_microseconds(lambda: direct(call.inputs, call.sizes, call.seed, call.uses, call.spins)),
        graph_microseconds(run),
    ]
    return [wrong or "right", *(f"{each:.1f}" for each in times)]


def kernels(recipe: str, tokens: Sequence[int], features: int) -> None:
    """Prints the table of single kernels."""
    target = find_target("auto")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("tokens", "kernel", "result", "operator us", "launch us", "device us"):
        table.add_column(column, overflow="fold")
    for count in tokens:
        for each in layer_kernels(recipe, target.name, (count, features, features)):
            table.add_row(str(count), Text(str(each.kernel)), *measured(example(each.kernel, each.sizes, "cuda")))
    Console(width=180).print(table)
    for text, reason in launch.FALLBACKS.items():
        sys.stdout.write(f"as plain PyTorch: {text}: {reason}\n")


def step(recipe: str, tokens: int, features: int) -> None:
    """One process: a compiled layer's step, as JSON."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(features, features, bias=False, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(layer, backend=lowprec, options={"recipe": recipe, "always": True})
    x = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)

    def run() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        return torch.autograd.grad(compiled(x), (x, layer.weight), dy)

    grads = run()
    digest = hashlib.sha256(b"".join(g.view(torch.int16).cpu().numpy().tobytes() for g in grads)).hexdigest()[:12]
    host = host_microseconds(run, 50) / 1e3
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(50):
        run()
    torch.cuda.synchronize()
    sys.stdout.write(json.dumps({"bits": digest, "host": host, "step": 20 * (time.perf_counter() - begin)}) + "\n")


def steps(recipe: str, tokens: Sequence[int], features: int) -> None:
    """Prints a compiled layer's step, opaque and revealed."""
    for count in tokens:
        for reveal in ("0", "1"):
            command = [
                sys.executable,
                __file__,
                "--recipe",
                recipe,
                "--tokens",
                str(count),
                "--features",
                str(features),
                "--step",
            ]
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, env={**os.environ, "LPCOMPILE_REVEAL": reveal}
            )
            said = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
            sys.stdout.write(f"{count} tokens, {'seen by Inductor' if reveal == '1' else 'opaque'}: {said}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs on a GPU; says so where there is none."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--recipe", default="fp8-rowwise")
    parser.add_argument("--tokens", default="256,8192")
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("launch_overhead: needs a GPU\n")
        return 1
    launch.install()
    tokens = [int(each) for each in args.tokens.split(",")]
    if args.step:
        step(args.recipe, tokens[0], args.features)
        return 0
    kernels(args.recipe, tokens, args.features)
    steps(args.recipe, tokens, args.features)
    return 0


if __name__ == "__main__":
    sys.exit(main())
