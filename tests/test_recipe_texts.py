"""Texts of recipes, products and casts: what they mean, and which part of a malformed one an error names."""

from __future__ import annotations

import re

import pytest

from lpcompile.errors import FormatError, OptionError, RecipeError
from lpcompile.formats import Quant
from lpcompile.recipe import Cast, Dot, Gemm, Recipe, Role


def test_high_precision_is_written_hp() -> None:
    assert Gemm.parse(" hp ") is None
    assert Gemm.parse("hp @ e4m3:row") == Gemm(None, Quant.parse("e4m3:row"))
    recipe = Recipe.parse("dgrad: e5m2:row @ e4m3:row; fprop: hp; keep:")
    assert (recipe.fprop, recipe.wgrad, recipe.keep) == (None, None, ())
    assert recipe.gemm(Role.DGRAD) == Gemm.parse("e5m2:row @ e4m3:row")
    assert Recipe.parse("").empty
    assert not recipe.empty


def test_symmetric_blocks_have_one_cast() -> None:
    assert Cast.parse("e4m3:128x128|0") == Cast.parse("e4m3:128x128|1")
    assert Cast.parse("e4m3:1x128|0") != Cast.parse("e4m3:1x128|1")
    assert Cast.parse("e4m3:128x128|0|0:h16") == Cast.parse("e4m3:128x128|1|0:h16") != Cast.parse("e4m3:128x128|1|1:h16")
    with pytest.raises(OptionError, match="2"):
        Cast(Quant.parse("e4m3:row"), 2)


@pytest.mark.parametrize(
    ("kind", "text", "token"),
    [
        (Gemm, "int8:row", "int8:row"),
        (Gemm, "int8:row @ int8:row @ hp", "int8:row @ int8:row @ hp"),
        (Gemm, "int8:row @ int8:col", "col"),
        (Gemm, "e4m4x:row @ hp", "e4m4x"),
        (Gemm, "e4m3:row @ e4m3:row * r16", "r16"),
        (Gemm, "e4m3:row @ e4m3:row * h22", "22"),
        (Gemm, "e4m3:row @ e4m3:row * x:h16", "x:h16"),
        (Gemm, "e4m3:row @ e4m3:row * n:h16 * n:h16", "n:h16"),
        (Gemm, "hp @ e4m3:row * m:h16", "hp"),
        (Gemm, "e4m3:row @ codes>hp", "hp"),
        (Gemm, "e4m3:row @ codes>e4m3:row * n:h16", "n not be given"),
        (Recipe, "dgrad: e4m3:row @ codes>e4m3:row", "fprop leaves"),
        (Recipe, "fprop: e4m3:row @ codes>e4m3:row", "codes"),
        (Gemm, "e4m3:row @ hp * h16", "hp"),
        (Recipe, "fprob: int8:row @ int8:row", "fprob"),
        (Recipe, "fprop int8", "fprop int8"),
        (Recipe, "fprop: hp; fprop: hp", "fprop"),
        (Recipe, "wgrad: int8:row", "int8:row"),
        (Recipe, "keep_last: most", "most"),
        (Recipe, "keep_last: 1.5", "1.5"),
        (Cast, "e4m3:row", "e4m3:row"),
        (Cast, "e4m3:row|2", "e4m3:row|2"),
        (Cast, "e4m3:row|1|1:h3", "3"),
        (Cast, "e4m3:row|1|0:hfull", "hfull"),
        (Cast, "e4m3:row|1|h16", "h16"),
        (Cast, "e4m3:rows|1", "rows"),
        (Dot, "e4m3:row|1", "e4m3:row|1"),
        (Dot, "e4m3:row|1 @ e4m3:row", "e4m3:row"),
    ],
)
def test_malformed_recipes_name_the_token(kind: type[Gemm | Recipe | Cast | Dot], text: str, token: str) -> None:
    with pytest.raises((RecipeError, FormatError), match=re.escape(token)):
        kind.parse(text)
