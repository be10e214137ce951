"""What surrounds a generated Gemm: split contractions, masks, rotations undone, pointwise work, the libraries' products."""

from __future__ import annotations

import pytest
import torch
from gemms import check, check_followed

from lpcompile.codegen import in_memory, schedules
from lpcompile.codegen.source import Sizes
from lpcompile.kernel import parse
from lpcompile.target import Target, find_target

TILE = (32, 32, 32)
ROW = "gemm e4m3:row|1 @ e4m3:row|1'"
FOLLOWED = [
    " -> f32 * mask",
    " -> bf16 * mask'",
    " -> bf16 * 1:h32",
    " -> f32 * 0:h16fixed",
    " -> bf16 * 0:h32drawn * 1:h4",
    " -> f32 * mask * 1:h32fixed",
    " -> bf16 then add(tanh(x0), x1) as bf16 with x1:bf16",
    " -> bf16 + bias then mul(silu(x0), mul(x1, x2)) as f32 with x1:f32[r] x2:bf16[c]",
    " -> bf16 * mask' * 0:h16drawn * 1:h32 then maximum(gelu(x0), mul(x1, 0.5)) as f16 with x1:bf16",
]


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("shape", [(64, 64, 128), (45, 39, 101)], ids=str)
@pytest.mark.parametrize("rest", FOLLOWED)
def test_steps_after_a_product(rest: str, shape: tuple[int, int, int], split: int):
    check_followed(ROW + rest, shape, TILE, split=split, tma=split == 1, persistent=split == 1)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("shape", [(64, 64, 256), (45, 39, 151)], ids=str)
@pytest.mark.parametrize(
    "text",
    [
        f"{ROW} -> f32 + bias",
        "gemm int8:row|1 @ int8:row|1' -> f32",
        "gemm e4m3:1x128|1 @ e4m3:128x128|1' -> f32",
        "gemm hp' @ hp -> f32",
    ],
)
def test_split_contractions(text: str, shape: tuple[int, int, int], tma: bool):
    result = check(text, shape, TILE, split=3, tma=tma, persistent=tma)
    if "int8" in text:
        assert torch.equal(result.found, result.reference)


@pytest.mark.parametrize("shape", [(48, 64, 32), (45, 39, 33)], ids=str)
@pytest.mark.parametrize(
    "rest",
    [
        " -> bf16 * 1:h256",
        " -> f32 * 0:h20fixed * 1:h24drawn",
        " -> bf16 * mask * 0:h512drawn then add(x0, x1) as f32 with x1:bf16[r]",
        " -> f16 * 0:h40 * 1:h2",
        " -> f32 * 1:h192",
    ],
)
def test_rotations_that_no_tile_holds(rest: str, shape: tuple[int, int, int]):
    check_followed(ROW + rest, shape, TILE)


@pytest.mark.parametrize(
    ("held", "whole"), [(1 << 14, 128), (256, 128), (256, 16)], ids=["by one program", "in passes", "in parts"]
)
def test_a_long_block_of_a_row(held: int, whole: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Target, "room", lambda *_: held)
    monkeypatch.setattr(in_memory, "_WHOLE", whole)
    monkeypatch.setattr(in_memory, "_PART", 16)
    check_followed(f"{ROW} -> bf16 * 0:h12 * 1:h3072drawn", (20, 50, 33), (32, 128, 32))


@pytest.mark.parametrize(
    ("text", "vendor"),
    [
        ("gemm hp @ hp' -> bf16", "mm"),
        ("gemm e4m3:1x32:e8m0:up|1~ @ e4m3:1x32:e8m0:up|0~ -> bf16 + bias", "mm"),
        ("gemm e5m2:tensor|1 @ e4m3:tensor|1' -> bf16", "scaled_mm"),
        (f"{ROW} -> bf16 + bias", "scaled_mm"),
        ("gemm int8:row|1 @ int8:tensor|1' -> f32 + bias", "int_mm"),
    ],
)
def test_products_of_the_libraries(text: str, vendor: str):
    shape = (64, 48, 128)
    (found,) = [each for each in schedules(parse(text), Sizes.of(*shape), find_target("sm_90")) if each.vendor]
    assert found.vendor == vendor
    check(text, shape, (), target="sm_90", vendor=vendor)


@pytest.mark.parametrize("text", [f"{ROW} -> bf16 * 1:h32", f"{ROW} -> f32", "gemm hp @ e4m3:row|1~' -> bf16"])
def test_libraries_do_nothing_else(text: str):
    assert not any(each.vendor for each in schedules(parse(text), Sizes.of(64, 48, 128), find_target("sm_90")))
