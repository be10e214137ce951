"""lpcompile: `torch.compile(model, backend="lowprec")` trains a model in FP8, INT8 and FP4 without touching it.

import lpcompile as lp
lp.explain(model, recipe="fp8-rowwise")(*inputs).print()      what becomes of each GEMM, and why
with lp.capture() as seen: compiled(x).sum().backward()       the rewritten graphs of what compiles inside
torch.compile(model, backend="lowprec", options={"passes": lp.pipeline_with(my_pass, after="quantize")})
"""

from lpcompile.backend import lowprec, pipeline_with
from lpcompile.errors import (
    FormatError,
    LowprecError,
    NotCompiledError,
    OptionError,
    RecipeError,
    StrictError,
    TargetError,
    VerifyError,
)
from lpcompile.explain import explain
from lpcompile.formats import Block, Float, Int, Quant
from lpcompile.freeze import freeze_quantized, thaw_quantized
from lpcompile.pipeline import Plan, Step, capture
from lpcompile.recipe import Gemm, Options, Recipe, Role
from lpcompile.recipes import RECIPES, find_recipe
from lpcompile.report import Report
from lpcompile.switch import switch_recipe

__all__ = [
    "RECIPES",
    "Block",
    "Float",
    "FormatError",
    "Gemm",
    "Int",
    "LowprecError",
    "NotCompiledError",
    "OptionError",
    "Options",
    "Plan",
    "Quant",
    "Recipe",
    "RecipeError",
    "Report",
    "Role",
    "Step",
    "StrictError",
    "TargetError",
    "VerifyError",
    "capture",
    "explain",
    "find_recipe",
    "freeze_quantized",
    "lowprec",
    "pipeline_with",
    "switch_recipe",
    "thaw_quantized",
]
