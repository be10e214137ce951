"""Proves and measures the generated kernels on a CUDA GPU: correctness, ceilings, kernels, layers, a whole model, training.

    python benchmarks/device.py                                   everything
    python benchmarks/device.py --only linear,e2e --torchao-wheel torchao-0.18.0-...whl
    python benchmarks/device.py --dry-run                         the script's own paths, on a CPU, in tiny sizes

Each part takes less than nine minutes (`--budget`); what it did not reach, it names. A short table per part comes last; the
full numbers, the schedules that won and the logs are in `--out`.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch
from device_ceilings import CEILINGS
from device_correct import CORRECT
from device_kernels import KERNELS
from device_layers import E2E, LINEAR, TRAIN
from device_run import Part, Row, Settings, columns, end, run_part, serve, unpack_wheel
from device_turns import TURNS

PARTS: dict[str, Part] = {part.name: part for part in (CORRECT, CEILINGS, KERNELS, LINEAR, E2E, TURNS, TRAIN)}


def machine(dry: bool) -> dict[str, str]:
    """What ran this."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "device": "cpu (dry run)"}
    if not dry:
        found["device"] = torch.cuda.get_device_name()
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "none"
    return found


def parse(argv: Sequence[str] | None) -> tuple[list[Part], Settings]:
    """Reads the command line."""
    defaults = Settings("")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", default=",".join(PARTS), help=f"parts, of {', '.join(PARTS)}")
    add("--recipes", default=",".join(defaults.recipes))
    add("--tokens", default=",".join(map(str, defaults.tokens)))
    add("--match", default="", help='only cases in whose names this is, such as "8192x4096x4096" of linear')
    add("--out", type=Path, default=Path("out/device"))
    add("--budget", type=float, default=defaults.budget, help="seconds a part may take")
    add("--minutes", type=float, default=defaults.minutes, help="of training per recipe, as bf16 takes them")
    add("--seeds", type=int, default=defaults.seeds, help="of initial weights in training")
    add("--torchao-wheel", type=Path, help="a wheel or an unpacked folder")
    add("--quick", action="store_true", help="fewer shapes and contenders")
    add("--graphs", action="store_true", help="every contender under CUDA graphs")
    add("--head", action="store_true", help="every contender converts the output head too")
    add("--always", action="store_true", help="convert also where low precision is predicted slower")
    add("--profile", action="store_true", help="also the time of each kernel in a step")
    add("--dry-run", action="store_true", help="on a CPU, in tiny sizes, with the reference executor")
    args = parser.parse_args(argv)
    if unknown := set(args.only.split(",")) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: training takes at least one")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry-run tries the script itself")
    args.out.mkdir(parents=True, exist_ok=True)
    torchao = str(unpack_wheel(args.torchao_wheel.resolve())) if args.torchao_wheel else ""
    settings = Settings(
        str(args.out.resolve()),
        tuple(args.recipes.split(",")),
        tuple(map(int, args.tokens.split(","))),
        args.budget,
        args.minutes,
        args.quick,
        args.dry_run,
        args.graphs,
        args.always,
        args.profile,
        torchao,
        args.seeds,
        args.head,
        args.match,
    )
    return [PARTS[name] for name in args.only.split(",")], settings


def main(argv: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Runs the parts, prints their tables and returns their rows."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--worker"]:
        serve(PARTS[argv[1]], Path(argv[2]), Path(argv[3]))
        return {}
    parts, settings = parse(argv)
    found: dict[str, list[Row]] = {}
    for part in parts:
        started = time.perf_counter()
        found[part.name] = run_part(part, settings, Path(__file__))
        print(f"{part.name}: {time.perf_counter() - started:.0f} s", flush=True)
        report = {"machine": machine(settings.dry), "settings": json.loads(settings.text()), "parts": found}
        (Path(settings.out) / "device.json").write_text(json.dumps(report, indent=1))
    print("\n" + ", ".join(f"{k} {v}" for k, v in machine(settings.dry).items()))
    for part in parts:
        rows = found[part.name]
        print(f"\n{columns(part.lines(rows))}")
        for row in rows:
            if "error" in row:
                print(f"  FAILED {row['name']}: {row['error'][:200]}")
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    main()
