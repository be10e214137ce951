"""What surrounds generation: compilation without a device, examples and their comparison, `emit`, goldens."""

from __future__ import annotations

import ast
import dataclasses
import os
import pathlib

import cross_compile
import pytest
import torch
from handwritten import source

from lpcompile.__main__ import main
from lpcompile.codegen import emit, module, schedules
from lpcompile.codegen.compile import Product, _product, compile_entry
from lpcompile.codegen.example import exact, example, mismatch
from lpcompile.codegen.source import Sizes
from lpcompile.errors import KernelError
from lpcompile.kernel import parse
from lpcompile.layer import layer_kernels
from lpcompile.target import find_target

GOLDEN = pathlib.Path(__file__).parent / "golden"

# ---- compilation -------------------------------------------------------------------------------------------------


def test_an_entry_is_compiled_for_another_machine():
    compiled = compile_entry(source(), source().entries[0], find_target("sm_100"))
    assert ".target sm_100" in compiled.ptx
    assert "EXIT" in compiled.sass()
    assert compiled.spills == 0 and 8 <= compiled.registers <= 64
    assert compiled.shared == 0 and compiled.fits
    assert not compiled.tma and compiled.products == frozenset()


def test_a_tile_that_is_turned_is_tried_with_fewer_registers():
    target, sizes = find_target("sm_90"), Sizes.of(256, 256)
    kernel = parse("cast x0:bf16 = x0 as bf16 -> e4m3:1x128|1|1:h128, e4m3:1x128|0|0:h128'")
    free, capped, *_ = schedules(kernel, sizes, target)
    assert (free.registers, capped.registers) == (0, 128) and "at most 128 registers" in str(capped)
    wide, narrow = (emit(kernel, sizes, target, each) for each in (free, capped))
    assert "maxnreg=128" in narrow.text and "maxnreg" not in wide.text
    assert compile_entry(narrow, narrow.entries[0], target).registers <= 128
    assert compile_entry(wide, wide.entries[0], target).registers > 128
    for plain in ("e4m3:1x128|1", "e2m1:1x32:e8m0:quest|1|1:h32", "e2m1:1x16:e4m3+f32|0|0:h16fixed", "int8:tensor|1|1:h4096"):
        assert not any(each.registers for each in schedules(parse(f"cast x0:bf16 = x0 as bf16 -> {plain}"), sizes, target))


@pytest.mark.parametrize(
    ("text", "called"),
    [
        ("mul(div(x0, add(exp(neg(x0)), 1.0)), x1)", "silu_of(x0)"),
        ("mul(x1, div(x0, add(1.0, exp(neg(x0)))))", "silu_of(x0)"),
        ("mul(div(1.0, add(exp(neg(mul(x0, x1))), 1.0)), x1)", "sigmoid_of(t0)"),
        ("div(x1, add(exp(neg(x0)), 1.0))", "div_of(x1, t2)"),
        ("div(x0, add(exp(neg(x0)), x1))", "div_of(x0, t2)"),
    ],
)
def test_the_logistic_function_is_recognised(text: str, called: str):
    kernel = parse(f"cast x0:bf16 x1:bf16 = {text} as bf16 -> e4m3:row:up|1")
    target, sizes = find_target("sm_90"), Sizes.of(256, 256)
    made = emit(kernel, sizes, target, schedules(kernel, sizes, target)[0]).text
    assert called in made and ("exp_of" in made) == ("div_of" in called)


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize(
    "prologue",
    [
        "x0:bf16 x1:bf16 = bf16(mul(bf16(div(x0, add(exp(neg(x0)), 1.0))), x1))",
        "x0:bf16 x1:bf16[c] x2:f32[r] = bf16(mul(bf16(mul(x0, x2)), x1))",
    ],
)
def test_a_prologue_leaves_room_for_two_peaks(prologue: str, target: str):
    kernel = parse(f"cast {prologue} as bf16 -> e2m1:1x16:e4m3+f32|1~, e2m1:1x16:e4m3+f32|0|0:h16fixed")
    found, sizes = find_target(target), Sizes.of(8192, 4096)
    made = emit(kernel, sizes, found, schedules(kernel, sizes, found)[0])
    assert [compile_entry(made, entry, found).spills for entry in made.entries] == [0, 0]


PLAIN = "x0:bf16 = x0"
NORM = "x0:bf16 x1:bf16[c] x2:bf16[c] x3:f32[r] x4:f32[r] = bf16(add(mul(mul(sub(x0, x3), x4), x1), x2))"


@pytest.mark.parametrize(
    ("made", "turn", "sizes", "target", "count"),
    [
        (PLAIN, "1:h11008drawn", (8192, 11008), "sm_90", 2),
        (PLAIN, "1:h14336drawn", (8192, 14336), "sm_89", 2),
        (PLAIN, "1:h14336drawn", (8192, 14336), "sm_90", 1),
        (PLAIN, "1:h28672drawn", (8192, 28672), "sm_80", 2),
        (PLAIN, "1:h53248drawn", (8192, 53248), "sm_100", 2),
        # A matrix of four parts is read for each tile.
        (PLAIN, "0:h224", (14336, 4096), "sm_90", 1),
        # Three tensors as wide as the row: fewer of them are on their way.
        (NORM, "1:h14336", (8192, 14336), "sm_90", 1),
    ],
)
def test_what_is_turned_in_memory_fits_into_registers_and_shared_memory(
    made: str, turn: str, sizes: tuple[int, int], target: str, count: int
):
    """One program for the whole row spills, or asks for more shared memory than there is, unless operands lie there."""
    found, known = find_target(target), Sizes.of(*sizes)
    kernel = parse(f"cast {made} as bf16 -> int8:tensor|1|{turn}")
    source = emit(kernel, known, found, schedules(kernel, known, found)[0])
    passes = [compile_entry(source, entry, found) for entry in source.entries if entry.name.startswith("turn_")]
    assert [(each.spills, each.fits) for each in passes] == [(0, True)] * count


def test_a_vector_beside_a_tile_leaves_the_tile_where_it_is():
    """A scale for each row that a thread holds a part of, not for each of 64: the tile keeps the layout of its load."""
    target, sizes = find_target("sm_90"), Sizes.of(512, 512)
    norm = "x0:bf16 x1:bf16[c] x2:f32[r] = bf16(mul(bf16(mul(x0, x2)), x1)) as bf16"
    kernel = parse(f"cast {norm} -> e4m3:1x128|1, e4m3:1x128|0'")
    made = emit(kernel, sizes, target, schedules(kernel, sizes, target)[0])
    assert compile_entry(made, made.entries[0], target).sass().count("CALL.REL") <= 20


def test_what_cannot_be_compiled_says_so():
    with pytest.raises(KernelError, match="no machine code for the target cpu"):
        compile_entry(source(), source().entries[0], find_target("cpu"))
    broken = dataclasses.replace(source(), text=source().text.replace("loaded.to", "missing.to"))
    with pytest.raises(KernelError, match=r"decode does not compile for sm_90.*missing is not defined"):
        compile_entry(broken, broken.entries[0], find_target("sm_90"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", Product("mma", "fp8")),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", Product("mma", "bf16")),
        ("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32", Product("mma", "int8")),
        (
            "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
            Product("mma", "mx4"),
        ),
        (
            "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3",
            Product("mma", "nvfp4"),
        ),
        ("wgmma.mma_async.sync.aligned.m64n128k32.f32.e5m2.e4m3", Product("wgmma", "fp8")),
        ("tcgen05.mma.cta_group::1.kind::f8f6f4", Product("tcgen05", "fp8")),
        ("tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.block32", Product("tcgen05", "mx8")),
        ("tcgen05.mma.cta_group::1.kind::mxf4.block_scale.block32", Product("tcgen05", "mx4")),
        ("tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16", Product("tcgen05", "nvfp4")),
    ],
)
def test_instructions_are_told_apart(name: str, expected: Product):
    assert _product(name) == expected


# ---- examples ----------------------------------------------------------------------------------------------------

EXAMPLES = [
    "cast x0:bf16 x1:f32[c] = mul(x0, x1) as bf16 -> keep, e4m3:1x128|1, e2m1:1x16:e4m3+f32:sr|0|0:h16fixed'",
    "requant e2m1:1x32:e8m0:quest|1 as bf16 -> e2m1:1x32:e8m0:matched|0|0:h32drawn'",
    "decode e2m1:1x16:e4m3+f32|0",
    "decode int8:row|1",
    "gemm e4m3:1x128|1 @ e4m3:128x128|1' -> bf16 + bias",
    "gemm e2m1:1x32:e8m0:quest|1~ @ e2m1:1x32:e8m0:quest|1~' -> bf16 * mask * 1:h32 then add(x0, x1) as f32 with x1:bf16",
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_a_comparison_sees_zeros_and_permutations(text: str):
    kernel = parse(text)
    call = example(kernel, (96, 160, 128)[: 3 if text.startswith("gemm") else 2])
    expected = call.reference()
    assert mismatch(kernel, call.reference(), expected) is None
    assert "tensors in place of" in str(mismatch(kernel, expected[1:], expected))
    for wrong in (lambda x: x.new_zeros(x.shape), lambda x: x.flip(0), lambda x: x.reshape(1, *x.shape)):
        assert mismatch(kernel, [wrong(expected[0]), *expected[1:]], expected) is not None


def test_one_flipped_bit_shows_where_bits_are_defined():
    kernel = parse("cast x0:bf16 = x0 as bf16 -> e4m3:1x128|1")
    call = example(kernel, (64, 128))
    codes, scale = call.reference()
    other = codes.clone()
    other.view(torch.uint8)[63, 127] ^= 1
    assert exact(kernel) and mismatch(kernel, [other, scale], [codes, scale]) is not None


# ---- a layer's kernels -------------------------------------------------------------------------------------------


def test_the_kernels_of_a_layer():
    found = layer_kernels("fp8-rowwise", "sm_90", (512, 256, 128))
    gemms = {each.roles: each.sizes for each in found if str(each.kernel).startswith("gemm")}
    assert gemms == {("fprop",): (512, 256, 128), ("dgrad",): (512, 128, 256), ("wgrad",): (256, 128, 512)}
    wgrad = layer_kernels("fp8-rowwise", "sm_90", (512, 256, 128), role="wgrad")
    assert 0 < len(wgrad) < len(found) and all("wgrad" in each.roles for each in wgrad)
    assert layer_kernels("none", "sm_90", (512, 256, 128)) == []


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("recipe", ["deepseek", "mxfp8", "halo2-int8", "nvfp4", "quartet2"])
def test_all_kernels_of_a_layer_are_generated(recipe: str, target: str):
    found = layer_kernels(recipe, target, (512, 256, 384))
    assert {role for each in found for role in each.roles} == {"fprop", "dgrad", "wgrad"}
    for each in found:
        assert emit(each.kernel, Sizes.of(*each.sizes), find_target(target)).entries


def test_emit_prints_source_and_resources(capsys):
    options = ["emit", "--recipe", "fp8-rowwise", "--target", "sm_90", "--shape", "512x256x256", "--role", "fprop"]
    assert main(options) == 0
    text = capsys.readouterr().out
    assert text.count("\n@") >= 3 and "used by linear fprop" in text and "target sm_90" in text
    assert main([*options, "--resources"]) == 0
    text = capsys.readouterr().out
    assert "wgmma fp8" in text and "255 registers a thread and 232448 bytes" in text
    assert main([*options, "--ptx"]) == 0
    assert "wgmma.mma_async" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "cpu"], "kernels are generated for sm_80"),
        (["--target", "sm_91"], "unknown target 'sm_91'"),
        (["--shape", "12"], "write MxNxK"),
        (["--shape", "axbxc"], "is not a shape"),
        (["--recipe", "fp9"], "fp9"),
    ],
)
def test_emit_says_what_was_mistyped(capsys, options: list[str], message: str):
    assert main(["emit", *options]) == 2
    assert message in capsys.readouterr().err


# ---- goldens -----------------------------------------------------------------------------------------------------

GOLDENS = [
    ("gemm", "fp8 row", "sm_90"),
    ("gemm", "deepseek", "sm_90"),
    ("gemm", "nvfp4", "sm_100"),
    ("gemm", "mxfp4", "sm_80"),
    ("cast", "fp8 row", "sm_90"),
    ("cast", "deepseek", "sm_90"),
    ("cast", "swiglu", "sm_90"),
    ("cast", "nvfp4 sr", "sm_100"),
    ("cast", "quest", "sm_120"),
    ("cast", "quest carried", "sm_90"),
    ("cast", "eden", "sm_90"),
    ("cast", "4 or 6", "sm_90"),
    ("requant", "quartet", "sm_100"),
    ("decode", "nvfp4", "sm_90"),
]


def unused(text: str) -> list[str]:
    """Functions that a module defines and nothing calls."""
    tree = ast.parse(text)
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {"launch", "main"}
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name not in read]


@pytest.mark.parametrize(("family", "name", "target"), GOLDENS, ids=["-".join(each) for each in GOLDENS])
def test_generated_text(family: str, name: str, target: str):
    """The text changes on purpose only: LPCOMPILE_UPDATE_GOLDEN=1 pytest tests/test_codegen_tools.py writes it anew."""
    sizes = Sizes.of(*cross_compile.SIZES[: 3 if family == "gemm" else 2])
    text = emit(parse(cross_compile.texts(family, target)[name]), sizes, find_target(target)).text
    waits = (".item(", ".tolist(", ".cpu(", ".numpy(", "synchronize", "if seed", "int(seed")
    launch = text.partition("def launch(")[2].partition("\ndef ")[0]
    assert launch and not any(wait in launch for wait in waits), "a launch never waits for the device"
    assert launch.count("enable_fp_fusion=False") >= 1
    assert unused(text) == []
    assert unused(text + "\n\ndef left_over():\n    pass\n") == ["left_over"]
    path = GOLDEN / f"{family}-{name.replace(' ', '_')}-{target}.expected"
    if os.environ.get("LPCOMPILE_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        module.write_aside(path, text)
    assert path.exists() and text == path.read_text(), f"{path.name} differs: LPCOMPILE_UPDATE_GOLDEN=1 writes it anew"
