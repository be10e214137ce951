"""What a generated kernel becomes on a target, without a device: PTX, SASS, registers, spills, shared memory.

compiled = compile_entry(source, source.entries[0], find_target("sm_100"))
compiled.products          {Product("tcgen05", "fp8")}: the tensor-core instructions in it
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from typing import Any

from lpcompile.codegen import module
from lpcompile.codegen.function import numbers_a_draw
from lpcompile.codegen.source import Entry, Source
from lpcompile.errors import KernelError
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen.compile", "import it as lpcompile.codegen.compile, not as codegen.compile"

# Bytes of shared memory that one program may have (CUDA C++ programming guide, "compute capabilities", opt-in maximum).
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}


@dataclass(frozen=True)
class Product:
    """A tensor-core instruction: `mma`, `wgmma` or `tcgen05`, and what it multiplies (`Target.rates` has the names; those with
    block scales in the instruction are mx8, mx4, nvfp4)."""

    instruction: str
    kind: str

    def __str__(self) -> str:
        return f"{self.instruction} {self.kind}"


@dataclass(frozen=True)
class Compiled:
    """One jit function for one target. shared: bytes a program asks for at its launch."""

    name: str
    target: Target
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)
    shared: int = 0
    warps: int = 4

    @functools.cached_property
    def _usage(self) -> dict[str, int]:
        text = _tool("cuobjdump", "--dump-resource-usage", cubin=self.cubin)
        return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}

    @property
    def registers(self) -> int:
        """Registers a thread."""
        return self._usage["REG"]

    @property
    def spills(self) -> int:
        """Bytes of local memory a thread: what did not fit into registers."""
        return self._usage["STACK"] + self._usage["LOCAL"]

    @property
    def products(self) -> frozenset[Product]:
        """The tensor-core instructions in the PTX."""
        return frozenset(_product(name) for name in re.findall(_PRODUCTS, self.ptx))

    @property
    def tma(self) -> bool:
        """True where tiles come or go through tensor descriptors."""
        return "cp.async.bulk.tensor" in self.ptx

    @property
    def fits(self) -> bool:
        """True where a multiprocessor of the target has the shared memory."""
        return self.shared <= SHARED_LIMIT[self.target.name]

    def sass(self) -> str:
        """The machine code as text."""
        return _tool("nvdisasm", "-c", cubin=self.cubin)


def compile_entry(source: Source, entry: Entry, target: Target, contract: bool = False) -> Compiled:
    """Compiles one jit function of a generated module for `target`, whatever machine this is. contract: a multiplication and an
    addition may become one rounding; launches never allow it.

    Raises KernelError for a target without Triton kernels, for what Triton cannot compile for it, and in a process whose Triton
    interprets.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import PTXASError

    if not target.name.startswith("sm_"):
        raise KernelError(f"there is no machine code for the target {target.name}: take one of {', '.join(SHARED_LIMIT)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise KernelError("Triton interprets in this process (TRITON_INTERPRET=1) and compiles nothing")
    fn = getattr(module.load(source), entry.name)
    constants = {each.name: each.value for each in entry.arguments if each.type == "constexpr"}
    described = (_gluon_source if entry.gluon else ASTSource)(
        fn=fn,
        signature={each.name: _layout(each.type) if entry.gluon else each.type for each in entry.arguments},
        constexprs=constants,
        # As a launch finds them, so that it finds in Triton's cache what is compiled here.
        attrs={
            (index,): [["tt.divisibility", 16]] if each.divisible else []
            for index, each in enumerate(entry.arguments)
            if re.fullmatch(r"\*.*|[iu]\d+", each.type) and not numbers_a_draw(each.name)
        },
    )
    options: dict[str, Any] = {"num_warps": entry.warps, "enable_fp_fusion": contract}
    if not entry.gluon:
        options["num_stages"] = entry.stages
    if entry.registers:
        options["maxnreg"] = entry.registers
    try:
        compiled = triton.compile(described, target=GPUTarget("cuda", int(target.name[3:]), 32), options=options)
    except (CompilationError, PTXASError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise KernelError(f"{source.kernel}: {entry.name} does not compile for {target.name}: {reason}") from error
    return Compiled(entry.name, target, compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared, entry.warps)


def _gluon_source(**described: Any) -> Any:
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource(**described)


def _layout(kind: str) -> str:
    """A descriptor's type with its layout in shared memory spelled out: `swizzled` is Gluon's default for its box."""
    from triton.experimental.gluon import language as gl

    match = re.fullmatch(r"tensordesc<(\w+)\[(\d+), (\d+)\],(\w+)>", kind)
    if not match:
        return kind
    bits = int(re.findall(r"\d+", match[1])[0])
    if match[4] == "swizzled":
        element = {8: gl.int8, 16: gl.int16, 32: gl.int32}[bits]
        layout = gl.NVMMASharedLayout.get_default_for([int(match[2]), int(match[3])], element)
    else:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=2)
    return f"{kind.rpartition(',')[0]},{layout!r}>"


_PRODUCTS = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.[\w.:]+"
_KINDS = (  # the first that is found in the instruction's name says what it multiplies
    ("kind::mxf8f6f4", "mx8"),
    ("kind::f8f6f4", "fp8"),
    ("kind::i8", "int8"),
    ("kind::f16", "bf16"),
    ("kind::tf32", "tf32"),
    (".ue4m3", "nvfp4"),
    ("kind::mxf4nvf4.block_scale.scale_vec::4X", "nvfp4"),
    ("kind::mxf4nvf4.block_scale.block16", "nvfp4"),
    ("kind::mxf4", "mx4"),
    (".e4m3", "fp8"),
    (".e5m2", "fp8"),
    (".s8", "int8"),
    (".u8", "int8"),
    (".bf16", "bf16"),
    (".f16.f16", "f16"),
    (".tf32", "tf32"),
)


def _product(name: str) -> Product:
    kind = next((kind for part, kind in _KINDS if part in name), "unknown")
    return Product(name.partition(".")[0], kind)


def _tool(name: str, *options: str, cubin: bytes) -> str:
    """The output of one of the CUDA tools that Triton brings, on a cubin."""
    from triton import knobs

    with tempfile.TemporaryDirectory(prefix="lpcompile-") as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        # Triton's own file, with fixed options.
        run = subprocess.run(  # noqa: S603
            [getattr(knobs.nvidia, name).path, *options, str(path)], check=True, capture_output=True, text=True
        )
    return run.stdout
