"""`python -m lpcompile recipes | targets | explain MODULE:ATTR | emit`: methods, hardware, what becomes of a model, kernels."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from lpcompile.codegen import emit
from lpcompile.codegen.compile import SHARED_LIMIT, Compiled, compile_entry
from lpcompile.codegen.source import Sizes, Source
from lpcompile.errors import KernelError, LowprecError, TargetError, near_matches
from lpcompile.explain import Restored, explain
from lpcompile.kernel import DTYPES as DTYPE_NAMES
from lpcompile.layer import LayerKernel, layer_kernels
from lpcompile.recipe import KEEP, Role
from lpcompile.recipes import ALIASES, RECIPES
from lpcompile.report import WIDTH, Report
from lpcompile.target import TARGETS, Target, find_target

DTYPES = {
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f32": torch.float32,
    "f64": torch.float64,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, or 2 with one line on stderr for what the user mistyped."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (LowprecError, _UsageError) as error:
        sys.stderr.write(f"lpcompile: {' '.join(str(error).split())}\n")
        return 2
    return 0


class _UsageError(Exception):
    """Something on the command line names nothing, or does not fit."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lpcompile", description="What low precision makes of a model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    recipes = commands.add_parser("recipes", help="the training methods: three GEMMs each, and what they keep")
    recipes.set_defaults(run=_recipes)
    targets = commands.add_parser("targets", help="the hardware: matrix rates by operand kind, memory, launch cost")
    targets.set_defaults(run=_targets)

    about = "compile a model with the reference executor, run it once, and say what became of each GEMM and why"
    command = commands.add_parser("explain", help=about, description=about)
    command.set_defaults(run=_explain)
    command.add_argument("model", metavar="MODULE:ATTR", help="a module, or a function that makes one or (it, inputs)")
    command.add_argument("--recipe", default="fp8-rowwise", help="a recipe's name or text (default: %(default)s)")
    command.add_argument("--target", default="auto", help="hardware to predict for (default: this machine)")
    command.add_argument("--keep", action="append", default=[], metavar="GLOB", help="layers to leave alone")
    command.add_argument("--input", action="append", default=[], metavar="2x16", help="shape of one input")
    command.add_argument(
        "--dtype", action="append", default=[], choices=DTYPES, help="dtype of each input, or of all (default: f32)"
    )
    command.add_argument("--graph", metavar="PASS", help="print the graph after this pass; 'input': as traced")
    command.add_argument("--always", action="store_true", help="convert also where low precision is predicted to be slower")
    command.add_argument("--kernels", action="store_true", help="list the kernels as well: bytes, time, rules, whom they serve")
    command.add_argument("--full", action="store_true", help="one line a layer and GEMM, equal layers not merged")
    _emit_parser(commands)
    for described in (recipes, targets, command):
        described.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _emit_parser(commands: Any) -> None:
    about = "print the generated kernels of a linear layer's three GEMMs and their casts"
    command = commands.add_parser("emit", help=about, description=about)
    command.set_defaults(run=_emit)
    command.add_argument("--recipe", default="fp8-rowwise", help="a recipe's name or text (default: %(default)s)")
    command.add_argument("--target", default="sm_90", help="hardware to generate for (default: %(default)s)")
    command.add_argument("--shape", default="4096x4096x4096", metavar="MxNxK", help="tokens, out- and in-features")
    command.add_argument("--dtype", default="bf16", choices=DTYPE_NAMES, help="dtype of the layer (default: %(default)s)")
    command.add_argument("--role", choices=[str(role) for role in Role], help="only what this GEMM needs")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--ptx", dest="form", action="store_const", const="ptx", help="print PTX in place of the source")
    form.add_argument("--sass", dest="form", action="store_const", const="sass", help="print machine code")
    form.add_argument("--resources", dest="form", action="store_const", const="resources", help="print a table")


# ---- recipes and targets -----------------------------------------------------------------------------------------


def _recipes(args: argparse.Namespace) -> None:
    if args.json:
        gemms = [{str(role): str(recipe.gemm(role) or "hp") for role in Role} for recipe in RECIPES]
        kept = [{"keep": list(recipe.keep), "keep_last": recipe.keep_last} for recipe in RECIPES]
        found = [{"name": r.name, **gemm, **keep} for r, gemm, keep in zip(RECIPES, gemms, kept, strict=True)]
        _write(json.dumps(found, indent=1))
        return
    table = _table("recipe", "GEMMs", "operands a @ b")
    for recipe in RECIPES:
        roles: dict[str, list[str]] = {}
        for role in Role:
            roles.setdefault(str(recipe.gemm(role) or "hp"), []).append(role)
        for index, (text, names) in enumerate(roles.items()):
            table.add_row(*(Text(cell) for cell in (recipe.name if index == 0 else "", " ".join(names), text)))
    console = _console()
    console.print(table)
    lines = [
        "fprop Y = X W^T, dgrad dX = dY W, wgrad dW = dY^T X; each GEMM's own (outer, contraction) coordinates",
        "operands: element:block[:scale][:rule][:rounding]; hp: stays in high precision; * a rotation of both",
        f"layers that stay in high precision: {' '.join(KEEP)}",
        *(f"{r.name} keeps instead: {' '.join(r.keep) or 'none'}" for r in RECIPES if r.keep != KEEP),
        *(f"{r.name} keeps as well: the last {r.keep_last:.0%} of the blocks" for r in RECIPES if r.keep_last),
        f"other names: {', '.join(f'{alias} = {name}' for alias, name in ALIASES.items())}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _targets(args: argparse.Namespace) -> None:
    if args.json:
        _write(json.dumps([asdict(target) for target in TARGETS], indent=1))
        return
    kinds = list(dict.fromkeys(kind for target in TARGETS for kind in target.rates))
    table = _table("target", *kinds, "memory TB/s", "launch us")
    for target in TARGETS:
        rates = [f"{target.rates[kind]:g}" if kind in target.rates else "-" for kind in kinds]
        table.add_row(target.name, *rates, f"{target.bandwidth:g}", f"{target.launch:g}")
    console = _console()
    console.print(table)
    line = "dense TFLOP/s by operand kind; -: no instruction, the operands are decoded and multiplied in bf16 or f32"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, overflow="fold")
    return table


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, WIDTH))


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")


# ---- explain -----------------------------------------------------------------------------------------------------


def _explain(args: argparse.Namespace) -> None:
    shapes = [_shape(text, "--input", "2x16") for text in args.input]
    names = args.dtype or ["f32"]
    if len(names) not in (1, len(shapes)):
        raise _UsageError(f"{len(names)} --dtype for {len(shapes)} --input: give one for all, or one each")
    dtypes = [DTYPES[name] for name in (names * len(shapes) if len(names) == 1 else names)]
    # Before the model is built, which may take a while: a mistyped recipe or target is known at once.
    explain(nn.Identity(), recipe=args.recipe, target=args.target, keep=args.keep)
    model, positional, keywords = _load(args.model)
    if shapes:
        positional, keywords = [_example(model, *each) for each in zip(shapes, dtypes, strict=True)], {}
    _check_inputs(model, positional, keywords)
    run = explain(model, recipe=args.recipe, target=args.target, keep=args.keep, always=args.always)
    report = run(*positional, **keywords)
    if not report.rows:
        sys.stderr.write(f"lpcompile: no GEMM was traced in {args.model}\n")
    _show(report, args)


def _show(report: Report, args: argparse.Namespace) -> None:
    if args.graph:
        for index in range(len(report.traces)):
            _write(f"# graph {index} after {args.graph}\n{report.graph(args.graph, index).strip()}\n")
    elif args.json:
        _write(report.to_json())
    else:
        report.print(compact=not args.full, kernels=args.kernels)


def _shape(text: str, option: str, like: str) -> list[int]:
    sizes = text.split("x")
    if not all(size.isascii() and size.isdecimal() for size in sizes):
        raise _UsageError(f"{option} {text!r} is not a shape; write e.g. {like}")
    return [int(size) for size in sizes]


def _example(model: nn.Module, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Gaussian numbers, or integers that every embedding of the model can look up."""
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    rows = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return torch.randint(0, min(rows, default=2), shape).to(dtype)


def _load(path: str) -> tuple[nn.Module, list[Any], dict[str, Any]]:
    """The module that MODULE:ATTR names or makes, and the inputs that come with it."""
    made, inputs = _find(path), None
    if not isinstance(made, nn.Module) and callable(made):
        try:
            inspect.signature(made).bind()
        except TypeError as error:
            raise _UsageError(f"{path} cannot be called without arguments: {error}") from None
        made = made()
    if isinstance(made, tuple) and len(made) == 2:
        made, inputs = made
    if not isinstance(made, nn.Module):
        raise _UsageError(f"{path} is no nn.Module and makes none, but a {type(made).__name__}")
    if isinstance(inputs, dict):
        return made, [], inputs
    return made, list(inputs) if isinstance(inputs, tuple | list) else [] if inputs is None else [inputs], {}


def _find(path: str) -> Any:
    module, colon, attribute = path.partition(":")
    if not (module and colon and attribute):
        raise _UsageError(f"{path!r}: write MODULE:ATTR, e.g. mypackage.models:build")
    # As under `python -m`: what stands in the current folder can be imported.
    here = str(pathlib.Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise _UsageError(f"cannot import {module!r}: {error}") from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name in dir(found) if not name.startswith("_")]
            raise _UsageError(f"{module!r} has no {attribute!r}.{near_matches(part, names)}")
        found = getattr(found, part)
    return found


def _check_inputs(model: nn.Module, positional: list[Any], keywords: dict[str, Any]) -> None:
    """One run without a compiler, which says in one line what does not fit and has nothing to do with us."""
    try:
        inspect.signature(model.forward).bind(*positional, **keywords)
    except TypeError as error:
        hint = "give --input SHAPE for each, or a function that returns (module, inputs)"
        raise _UsageError(f"{type(model).__name__}.forward: {error}; {hint}") from None
    with torch.no_grad(), torch.random.fork_rng(devices=[]), Restored(model):
        try:
            model(*positional, **keywords)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            raise _UsageError(f"the model does not run on these inputs, compiled or not: {error}") from error


# ---- emit --------------------------------------------------------------------------------------------------------


def _emit(args: argparse.Namespace) -> None:
    shape = _shape(args.shape, "--shape", "4096x4096x4096")
    if len(shape) != 3 or 0 in shape:
        raise _UsageError(f"--shape {args.shape!r}: write MxNxK, tokens x out-features x in-features")
    target = find_target(args.target)
    if target.name not in SHARED_LIMIT:
        raise TargetError(f"kernels are generated for {', '.join(SHARED_LIMIT)}, not for {target.name}")
    found = layer_kernels(args.recipe, target.name, shape, DTYPE_NAMES[args.dtype], args.role)
    if not found:
        sys.stderr.write("lpcompile: this recipe leaves the GEMM in high precision: nothing is generated\n")
    elif args.form == "resources":
        _resources(found, target)
    else:
        for each in found:
            _write("\n\n".join(_generated(each, target, args.form)))


def _source(each: LayerKernel, target: Target) -> Source:
    return emit(each.kernel, Sizes.of(*each.sizes), target, sites=[f"linear {role}" for role in each.roles])


def _generated(each: LayerKernel, target: Target, form: str | None) -> list[str]:
    """Source, PTX or SASS of a kernel; why there is none in a comment."""
    try:
        source = _source(each, target)
        if form is None:
            return [source.text]
        compiled = [compile_entry(source, entry, target) for entry in source.entries]
    except KernelError as error:
        return [f"# {each.kernel}: {error}"]
    return [f"// {each.kernel}: {one.name}\n{one.ptx if form == 'ptx' else one.sass()}" for one in compiled]


def _resources(found: Sequence[LayerKernel], target: Target) -> None:
    table = _table("serves", "kernel", "schedule", "function", "registers", "spills", "shared", "tensor cores", "TMA")
    for each in found:
        first = [Text(" ".join(each.roles)), Text(str(each.kernel))]
        try:
            source = _source(each, target)
            compiled = [compile_entry(source, entry, target) for entry in source.entries]
        except KernelError as error:
            table.add_row(*first, Text(str(error)))
            continue
        for index, one in enumerate(compiled):
            described = [*first, Text(str(source.schedule))] if index == 0 else [Text()] * 3
            table.add_row(*described, one.name, *_cells(one))
    console = _console()
    console.print(table)
    limit = f"{target.name}: at most 255 registers a thread and {SHARED_LIMIT[target.name]} bytes of shared memory a program"
    console.print(f"{limit}; spills and shared in bytes", markup=False, highlight=False, soft_wrap=True)


def _cells(compiled: Compiled) -> list[str]:
    products = ", ".join(sorted(map(str, compiled.products))) or "-"
    return [*map(str, (compiled.registers, compiled.spills, compiled.shared)), products, "yes" if compiled.tma else "-"]


if __name__ == "__main__":
    sys.exit(main())
