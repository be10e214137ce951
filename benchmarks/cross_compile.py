"""Every kernel family, format and target, compiled without a device: registers, spills, shared memory, instructions.

    python benchmarks/cross_compile.py --targets sm_90,sm_100 --families gemm
    python benchmarks/cross_compile.py --targets sm_90 --families layer       (what the recipes make of a linear layer)

One line a jit function, and what is wrong with it: spilled registers, shared memory that the target does not have, a
tensor-core instruction other than the one it should have, tiles that do not come through tensor descriptors where they could.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lpcompile.carrier import CARRIER, carrying
from lpcompile.codegen import emit
from lpcompile.codegen.compile import SHARED_LIMIT, Compiled, Product, compile_entry
from lpcompile.codegen.source import Sizes
from lpcompile.errors import KernelError
from lpcompile.kernel import GemmKernel, Kernel, parse
from lpcompile.layer import layer_kernels
from lpcompile.recipe import Cast
from lpcompile.target import Target, find_target

TARGETS = tuple(SHARED_LIMIT)
INSTRUCTION = {"sm_80": "mma", "sm_89": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma"}
TMA = ("sm_90", "sm_100", "sm_120")
SIZES = (4096, 4096, 4096)


@dataclass(frozen=True)
class Gemm:
    """A product in one format. native: the operand kind of the instruction on each target that has one; elsewhere FP8 bears
    the operands, or they come as bf16 values. after: what follows in the kernel's text."""

    left: str
    right: str
    native: dict[str, str]
    after: str = ""

    def carried(self, target: str) -> bool:
        left, right = (Cast.parse(side).quant for side in (self.left, self.right))
        return find_target(target).carries(left, right)

    def text(self, target: str) -> str:
        if self.carried(target):
            return f"gemm {CARRIER}|1 @ {CARRIER}|1' -> bf16{self.after}"
        decoded = "" if target in self.native else "~"
        return f"gemm {self.left}{decoded} @ {self.right}{decoded}' -> bf16{self.after}"

    def products(self, target: str, follows: bool) -> set[Product]:
        """The instructions of its function `gemm`: a rotation undone is a product of bf16 tiles, unless a function follows."""
        undone = {Product(INSTRUCTION[target], "bf16")} if ":h" in self.after and not follows else set()
        kind = "fp8" if self.carried(target) else self.native.get(target, "bf16")
        return {Product(INSTRUCTION[target], kind), *undone}


_FP8 = dict.fromkeys(("sm_89", "sm_90", "sm_100", "sm_120"), "fp8")
_INT8 = dict.fromkeys(TARGETS, "int8")
_MX4 = dict.fromkeys(("sm_100", "sm_120"), "mx4")
_BLACKWELL = ("sm_100", "sm_120")
GEMMS = {
    "fp8 tensor": Gemm("e4m3:tensor|1", "e5m2:tensor|1", _FP8),
    "fp8 row": Gemm("e4m3:row:up|1", "e4m3:row:up|1", _FP8),
    "fp8 residual": Gemm("e4m3:row:up|1", "e4m3:row:up|1", _FP8, " + bias then add(x0, x1) as bf16 with x1:bf16"),
    "deepseek": Gemm("e4m3:1x128|1", "e4m3:128x128|1", _FP8),
    "deepseek dW": Gemm("e4m3:1x128|1", "e4m3:1x128|1", _FP8),
    "int8 row": Gemm("int8:row|1", "int8:row|1", _INT8),
    "mxfp8": Gemm("e4m3:1x32:e8m0:up|1", "e4m3:1x32:e8m0:up|1", dict.fromkeys(_BLACKWELL, "mx8")),
    "mxfp4": Gemm("e2m1:1x32:e8m0:up|1", "e2m1:1x32:e8m0:up|1", _MX4),
    "mxfp4 undone": Gemm("e2m1:1x32:e8m0:matched|1", "e2m1:1x32:e8m0:matched|1", _MX4, " * mask * 1:h32"),
    "nvfp4": Gemm("e2m1:1x16:e4m3+f32|1", "e2m1:1x16:e4m3+f32|1", dict.fromkeys(_BLACKWELL, "nvfp4")),
}
ROWS_BOTH, BLOCKS_BOTH = "e4m3:row:up|0', e4m3:row:up|1", "e4m3:1x128|0', e4m3:1x128|1"
SWIGLU_GRADIENTS = (
    "cast x0:bf16 x1:bf16 x2:bf16 = mul(x1, bf16(silu(x0))); "
    "mul(mul(bf16(mul(x1, x2)), sigmoid(x0)), add(mul(x0, sub(1.0, sigmoid(x0))), 1.0)) as bf16"
)
CASTS = {
    "fp8 tensor": "cast x0:bf16 = x0 as bf16 -> e5m2:tensor|1, e5m2:tensor|1'",
    "fp8 row": "cast x0:bf16 = x0 as bf16 -> e4m3:row:up|1, e4m3:row:up|0'",
    "deepseek": "cast x0:bf16 = x0 as bf16 -> e4m3:1x128|1, e4m3:1x128|0'",
    "deepseek W": "cast x0:bf16 = x0 as bf16 -> e4m3:128x128|1, e4m3:128x128|1'",
    "swiglu": "cast x0:bf16 x1:bf16 = mul(silu(x0), x1) as bf16 -> keep, e4m3:1x128|1",
    "swiglu dX": f"{SWIGLU_GRADIENTS} -> {'; '.join(2 * [ROWS_BOTH])}",
    "swiglu dX blocks": f"{SWIGLU_GRADIENTS} -> {'; '.join(2 * [BLOCKS_BOTH])}",
    "norm": "cast x0:bf16 x1:f32[r] x2:bf16[c] = mul(bf16(mul(x0, x1)), x2) as bf16 -> e4m3:1x32:e8m0:up|1",
    "int8": "cast x0:bf16 = x0 as bf16 -> int8:row|1",
    "int8 turned": "cast x0:bf16 = x0 as bf16 -> int8:tensor|1|1:h256",
    "mxfp8": "cast x0:bf16 = x0 as bf16 -> e4m3:1x32:e8m0:up|1, e4m3:1x32:e8m0:up|0'",
    "mxfp8 decoded": "cast x0:bf16 = x0 as bf16 -> e4m3:1x32:e8m0:up|1~",
    "mxfp4": "cast x0:bf16 = x0 as bf16 -> e2m1:1x32:e8m0:up|1",
    "quest": "cast x0:bf16 = x0 as bf16 -> e2m1:1x32:e8m0:quest|1|1:h32",
    "mxfp4 carried": f"cast x0:bf16 = x0 as bf16 -> e2m1:1x32:e8m0:up|1~{CARRIER}, e2m1:1x32:e8m0:up|0~{CARRIER}'",
    "quest carried": f"cast x0:bf16 = x0 as bf16 -> e2m1:1x32:e8m0:quest|1|1:h32~{carrying(32)}, e2m1:1x32:e8m0:quest|1|1:h32",
    "matched": "cast x0:bf16 = x0 as bf16 -> e2m1:1x32:e8m0:matched|0|0:h32drawn'",
    "nvfp4": "cast x0:bf16 = x0 as bf16 -> e2m1:1x16:e4m3+f32|1, e2m1:1x16:e4m3+f32|0|0:h16fixed'",
    "nvfp4 sr": "cast x0:bf16 = x0 as bf16 -> e2m1:1x16:e4m3+f32:sr8|1, e2m1:1x16:e4m3+f32:sr8|0|0:h16fixed'",
    "nvfp4 W": "cast x0:bf16 = x0 as bf16 -> e2m1:16x16:e4m3+f32|1, e2m1:16x16:e4m3+f32|1'",
    "4 or 6": "cast x0:bf16 = x0 as bf16 -> e2m1:1x16:e4m3+f32:4over6|1",
    "eden": "cast x0:bf16 = x0 as bf16 -> e2m1:1x16:e4m3+f32:eden|1|1:h128drawn",
}
REQUANTS = {
    "quartet": "requant e2m1:1x32:e8m0:quest|1|1:h32 as bf16 -> e2m1:1x32:e8m0:matched|0|0:h32drawn'",
    "quartet carried": f"requant e2m1:1x32:e8m0:quest|1|1:h32 as bf16 -> e2m1:1x32:e8m0:matched|0|0:h32drawn~{carrying(32)}'",
    "mxfp4 carried": f"requant e2m1:1x32:e8m0:up|0 as bf16 -> {CARRIER}|0'",
    "quartet2": "requant e2m1:1x16:e4m3+f32:4over6|1 as bf16 -> e2m1:1x16:e4m3+f32:eden|0|0:h128drawn'",
}
DECODES = {"mxfp8": "decode e4m3:1x32:e8m0:up|1", "nvfp4": "decode e2m1:1x16:e4m3+f32|1", "int8": "decode int8:row|1"}
LAYERS = (
    "fp8-tensorwise",
    "fp8-rowwise",
    "deepseek",
    "mxfp8",
    "int8-rowwise",
    "halo2-int8",
    "mxfp4",
    "quartet",
    "nvfp4",
    "quartet2",
)
FAMILIES = ("gemm", "cast", "requant", "decode")


@dataclass(frozen=True)
class Row:
    """One jit function of a kernel, or why there is none; and what is wrong."""

    family: str
    name: str
    target: str
    compiled: Compiled | None
    faults: tuple[str, ...]


def texts(family: str, target: str) -> dict[str, str]:
    """The kernels of a family as the pipeline asks for them on a target, by name."""
    if family == "gemm":
        return {name: gemm.text(target) for name, gemm in GEMMS.items()}
    return {"cast": CASTS, "requant": REQUANTS, "decode": DECODES}[family]


def rows(family: str, name: str, target: str) -> list[Row]:
    """Compiles a kernel with its default schedule and judges each of its functions."""
    if family == "layer":
        found = [(" ".join((name, *each.roles)), each.kernel, each.sizes) for each in layer_kernels(name, target, SIZES)]
        return [row for label, kernel, sizes in found for row in _compiled(family, label, kernel, sizes, target)]
    return _compiled(family, name, parse(texts(family, target)[name]), SIZES[: 3 if family == "gemm" else 2], target)


def _compiled(family: str, name: str, kernel: Kernel, sizes: Sequence[int], target: str) -> list[Row]:
    machine = find_target(target)
    try:
        source = emit(kernel, Sizes.of(*sizes), machine)
        found = [compile_entry(source, entry, machine) for entry in source.entries]
    except KernelError as error:
        return [Row(family, name, target, None, (str(error),))]
    follows = any(each.name == "follow" for each in found)
    return [Row(family, name, target, each, _faults(each, kernel, name, machine, follows)) for each in found]


def _faults(compiled: Compiled, kernel: Kernel, name: str, target: Target, follows: bool) -> tuple[str, ...]:
    found = []
    if compiled.spills:
        found.append(f"{compiled.spills} bytes spilled")
    if not compiled.fits:
        found.append(f"{compiled.shared} bytes of shared memory, of {SHARED_LIMIT[target.name]}")
    if isinstance(kernel, GemmKernel) and name in GEMMS:
        expected = GEMMS[name].products(target.name, follows)
        # A function that only adds parts up multiplies nothing.
        if compiled.products != expected and compiled.name == "gemm":
            found.append(f"multiplies with {_names(compiled.products)} in place of {_names(expected)}")
        if target.name in TMA and not compiled.tma and compiled.name == "gemm":
            found.append("no tensor descriptors")
    elif not isinstance(kernel, GemmKernel) and any(product.kind != "bf16" for product in compiled.products):
        # A rotation is a product with a small matrix, exact in bf16.
        found.append(f"multiplies with {_names(compiled.products)}")
    return tuple(found)


def _names(products: Collection[Product]) -> str:
    return ", ".join(sorted(map(str, products))) or "nothing"


def table(targets: Sequence[str], families: Sequence[str]) -> Iterator[Row]:
    """All rows, as they come."""
    for family in families:
        for target in targets:
            for name in LAYERS if family == "layer" else texts(family, target):
                yield from rows(family, name, target)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--families", default=",".join(FAMILIES))
    args = parser.parse_args(argv)
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("family", "kernel", "target", "function", "registers", "spills", "shared", "tensor cores", "TMA", "wrong"):
        shown.add_column(column, overflow="fold")
    wrong = 0
    for row in table(args.targets.split(","), args.families.split(",")):
        wrong += bool(row.faults)
        one = row.compiled
        cells = ["", "", "", "", "", ""]
        if one is not None:
            products = _names(one.products) if one.products else ""
            cells = [one.name, str(one.registers), str(one.spills), str(one.shared), products, "yes" if one.tma else ""]
        shown.add_row(row.family, row.name, row.target, *cells, Text("; ".join(row.faults)))
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(shown)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
