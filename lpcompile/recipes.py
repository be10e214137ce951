"""The methods, as data. Each recipe's comment gives its three GEMM equations; Q(...) quantises along the contraction.

T tokens, K in-features, N out-features. X [T, K] input, W [N, K] weight, E = dY [T, N] gradient of the output.
All scales are dynamic and FP32 unless said otherwise; a bias is added in high precision and its gradient is the column
sum of the unquantised E; output heads and embeddings stay in high precision.
"""

from __future__ import annotations

from lpcompile.errors import RecipeError, near_matches
from lpcompile.formats import Quant
from lpcompile.recipe import Gemm, Recipe, Rotation


def _gemm(a: str, b: str, rotation: str | None = None) -> Gemm:
    return Gemm(Quant.parse(a), Quant.parse(b), Rotation.parse(rotation) if rotation else None)


# Y = X W^T, dX = E W, dW = E^T X: nothing is touched; the compiled code is bitwise Inductor's.
NONE = Recipe("none")

# One scale per tensor, so the same codes serve every GEMM that reads the tensor. Gradients need E5M2's range.
# Y = Q(X) Q(W)^T       X, W: E4M3, per tensor
# dX = Q(E) Q(W)        E: E5M2, per tensor
# dW = Q(E)^T Q(X)
FP8_TENSORWISE = Recipe(
    "fp8-tensorwise",
    fprop=_gemm("e4m3:tensor", "e4m3:tensor"),
    dgrad=_gemm("e5m2:tensor", "e4m3:tensor"),
    wgrad=_gemm("e5m2:tensor", "e4m3:tensor"),
)

# One scale per row along each GEMM's own contraction, rounded up to a power of two so that scaling is exact.
# Y = Qk(X) Qk(W)^T     X per token, W per out-feature
# dX = Qn(E) Qn(W)      E per token, W per in-feature
# dW = Qt(E)^T Qt(X)    E per out-feature, X per in-feature
_ROW = _gemm("e4m3:row:up", "e4m3:row:up")
FP8_ROWWISE = Recipe("fp8-rowwise", fprop=_ROW, dgrad=_ROW, wgrad=_ROW)

# The same with dW = E^T X in high precision.
FP8_ROWWISE_GW_HP = Recipe("fp8-rowwise-gw-hp", fprop=_ROW, dgrad=_ROW)

# DeepSeek-V3 (arXiv 2412.19437 section 3.3): 1x128 strips for X and E, 128x128 blocks for W; every 128-long partial
# product is scaled and added in FP32. No lower clamp on amax: gradients live below the published 1e-4.
# Y = Q(X) Q(W)^T       X: 128 in-features of one token; W: 128x128
# dX = Q(E) Q(W)        E: 128 out-features of one token; W: the codes of fprop
# dW = Q(E)^T Q(X)      E, X: 128 tokens of one feature, both from the high-precision tensor
DEEPSEEK = Recipe(
    "deepseek",
    fprop=_gemm("e4m3:1x128", "e4m3:128x128"),
    dgrad=_gemm("e4m3:1x128", "e4m3:128x128"),
    wgrad=_gemm("e4m3:1x128", "e4m3:1x128"),
)

# OCP MXFP8: 1x32 blocks along each contraction, E8M0 scales rounded up so that nothing saturates.
_MXFP8 = _gemm("e4m3:1x32:e8m0:up", "e4m3:1x32:e8m0:up")
MXFP8 = Recipe("mxfp8", fprop=_MXFP8, dgrad=_MXFP8, wgrad=_MXFP8)

# INT8 +-127, one scale per row along each contraction; integer accumulation is exact.
_INT8 = _gemm("int8:row", "int8:row")
INT8_ROWWISE = Recipe("int8-rowwise", fprop=_INT8, dgrad=_INT8, wgrad=_INT8)

# MXFP4, plain: 1x32 blocks along each contraction, E8M0 scales rounded up, nearest-even everywhere.
_MXFP4 = _gemm("e2m1:1x32:e8m0:up", "e2m1:1x32:e8m0:up")
MXFP4 = Recipe("mxfp4", fprop=_MXFP4, dgrad=_MXFP4, wgrad=_MXFP4)

# NVIDIA's NVFP4 pre-training (arXiv 2509.25149): E2M1 with an E4M3 scale per 16 and an FP32 scale per tensor. Weights in
# 16x16 blocks, so that fprop and dgrad see one weight; gradients rounded stochastically, each GEMM with a stream of its own;
# the operands of wgrad turned by a random Hadamard of 16 along tokens (one fixed sign vector). The last 15 % of the
# blocks keep high precision.
# Y = Q(X) Q16(W)^T         dX = Qsr(E) Q16(W)         dW = Qsr(E^T R) Q(X^T R)^T
_FP4 = "e2m1:1x16:e4m3+f32"
NVFP4 = Recipe(
    "nvfp4",
    fprop=_gemm(_FP4, "e2m1:16x16:e4m3+f32"),
    dgrad=_gemm(_FP4 + ":sr", "e2m1:16x16:e4m3+f32"),
    wgrad=_gemm(_FP4 + ":sr", _FP4, "h16fixed"),
    keep_last=0.15,
)

RECIPES = (NONE, FP8_TENSORWISE, FP8_ROWWISE, FP8_ROWWISE_GW_HP, DEEPSEEK, MXFP8, INT8_ROWWISE, MXFP4, NVFP4)

# torchao's names for the same methods.
ALIASES = {"tensorwise": "fp8-tensorwise", "rowwise": "fp8-rowwise", "rowwise_with_gw_hp": "fp8-rowwise-gw-hp"}


def find_recipe(recipe: str | Recipe) -> Recipe:
    """The Recipe for a name, an alias, a text (it contains a colon) or a Recipe. Raises RecipeError with near matches."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise RecipeError(f"a recipe is a name, a text or a Recipe, not {type(recipe).__name__}")
    if ":" in recipe:
        return Recipe.parse(recipe)
    by_name = {r.name: r for r in RECIPES}
    name = ALIASES.get(recipe, recipe)
    if name not in by_name:
        raise RecipeError(f"unknown recipe {recipe!r}.{near_matches(recipe, [*by_name, *ALIASES])}")
    return by_name[name]
