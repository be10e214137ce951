"""The methods, as data. Each recipe's comment gives its three GEMM equations; Q(...) quantises along the contraction.

T tokens, K in-features, N out-features. X [T, K] input, W [N, K] weight, E = dY [T, N] gradient of the output.
All scales are dynamic and FP32 unless said otherwise; a bias is added in high precision and its gradient is the column
sum of the unquantised E; output heads and embeddings stay in high precision.
"""

from __future__ import annotations

import re

from lpcompile.errors import RecipeError, near_matches
from lpcompile.formats import Quant
from lpcompile.recipe import Gemm, Recipe, Rotation


def _gemm(a: str, b: str, codes: bool = False, **rotations: str) -> Gemm:
    return Gemm(Quant.parse(a), Quant.parse(b), codes=codes, **{k: Rotation.parse(r) for k, r in rotations.items()})


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
# 16x16 blocks, so that fprop and dgrad see one weight; gradients rounded stochastically, by 8 random bits as the hardware's
# instruction takes them, each GEMM with a stream of its own;
# the operands of wgrad turned by a random Hadamard of 16 along tokens (one fixed sign vector). The last 15 % of the
# blocks keep high precision.
# Y = Q(X) Q16(W)^T         dX = Qsr(E) Q16(W)         dW = Qsr(E^T R) Q(X^T R)^T
_FP4 = "e2m1:1x16:e4m3+f32"
NVFP4 = Recipe(
    "nvfp4",
    fprop=_gemm(_FP4, "e2m1:16x16:e4m3+f32"),
    dgrad=_gemm(_FP4 + ":sr8", "e2m1:16x16:e4m3+f32"),
    wgrad=_gemm(_FP4 + ":sr8", _FP4, k="h16fixed"),
    keep_last=0.15,
)

# HALO (arXiv 2501.02625): one scale per tensor; X' = X H along in-features, E' = H E along tokens, over the whole axis.
# level 0   Y = Q(X) Q(W)^T         dX = Q(E) Q(W)                  dW = Q(E)^T Q(X)
# level 1   Y = Q(X') Q(W')^T       dX = [Q(E) Q(W')] H^T           dW = [Q(E)^T Q(X')] H^T
# level 2   as 1                    dX = H^T [Q(E') Q(W')] H^T      as 1
# level 2x  as 1                    as 2                            dW = [Q(E')^T Q(H X')] H^T
# Level 2x is ours: token outliers of E reach dW as well, and there the rotation cancels, so that E is quantised only once.
_HALO_FORMATS = {"fp8": "e4m3:tensor", "fp6": "e3m2:tensor:clip=0.75", "fp4": "e2m1:tensor:clip=0.75"}
_HALO_DEFAULTS = {"0": "fp8", "1": "fp6", "2": "int8", "2x": "int8"}
_HALO_NAME = re.compile(r"halo(0|1|2x?)(?:-(\w+))?")


def halo(level: str, elem: str, name: str) -> Recipe:
    """HALO at a level ("0", "1", "2", "2x") in a format: fp8, fp6, fp4 (those of HALO's code), int8 or any other element.

    Raises FormatError for an unknown format.
    """
    quant = Quant.parse(_HALO_FORMATS.get(elem, f"{elem}:tensor"))
    whole = Rotation.parse("hfull")
    features = whole if level != "0" else None
    tokens = whole if level in ("2", "2x") else None
    return Recipe(
        name,
        fprop=Gemm(quant, quant, k=features),
        dgrad=Gemm(quant, quant, m=tokens, n=features),
        wgrad=Gemm(quant, quant, k=whole if level == "2x" else None, n=features),
    )


HALO = tuple(halo(level, elem, f"halo{level}") for level, elem in _HALO_DEFAULTS.items())
INT8_TENSORWISE = halo("0", "int8", "int8-tensorwise")


# Quartet (arXiv 2505.14669 v4): MXFP4. H turns 32 in-features of X and W; QuEST fits the scale to the RMS and remembers in M
# what it clipped. Backward takes the codes of fprop, turned anew with drawn signs (R, 32 long) and shrunk by 3/4.
# Y  = Q(XH) Q(WH)^T
# dX = ([A(E R) A(Q(WH)^T R)^T] * Mx) H^T
# dW = ([A(E^T R) A(Q(XH)^T R)^T] * Mw) H^T
def _quartet(name: str, rule: str = "quest", rounding: str = "") -> Recipe:
    forward, backward = f"e2m1:1x32:e8m0:{rule}", f"e2m1:1x32:e8m0:matched{rounding}"
    gradient = _gemm(backward, backward, codes=True, k="h32drawn")
    return Recipe(name, fprop=_gemm(forward, forward, k="h32"), dgrad=gradient, wgrad=gradient)


QUARTET = _quartet("quartet")
QUARTET_PAPER = _quartet("quartet-paper", rule="questpaper")  # the released quantiser: scale rounded down, mean subtracted
QUARTET_SR = _quartet("quartet-sr", rounding=":sr")  # version 1: stochastic rounding in backward

# Quartet II (arXiv 2601.22813): NVFP4. Forward picks 4 or 6 for each block's absmax; backward turns the codes of fprop and E
# with drawn signs (R, 128 long) and rounds to nearest, with an unbiasing correction in the scales (MS-EDEN).
# Y = Q46(X) Q46(W)^T,  dX = Q(E R) Q(Q46(W)^T R)^T,  dW = Q(E^T R) Q(Q46(X)^T R)^T
_EDEN = _gemm(_FP4 + ":eden", _FP4 + ":eden", codes=True, k="h128drawn")
QUARTET2 = Recipe("quartet2", fprop=_gemm(_FP4 + ":4over6", _FP4 + ":4over6"), dgrad=_EDEN, wgrad=_EDEN)

RECIPES = (
    NONE,
    FP8_TENSORWISE,
    FP8_ROWWISE,
    FP8_ROWWISE_GW_HP,
    DEEPSEEK,
    MXFP8,
    INT8_TENSORWISE,
    INT8_ROWWISE,
    *HALO,
    MXFP4,
    QUARTET,
    QUARTET_PAPER,
    QUARTET_SR,
    NVFP4,
    QUARTET2,
)

# torchao's names for the same methods, and the best of a width by its plain name.
ALIASES = {
    "tensorwise": "fp8-tensorwise",
    "rowwise": "fp8-rowwise",
    "rowwise_with_gw_hp": "fp8-rowwise-gw-hp",
    "fp4": "quartet2",
}


def find_recipe(recipe: str | Recipe) -> Recipe:
    """The Recipe for a name, an alias, a text (it contains a colon) or a Recipe. Raises RecipeError with near matches."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise RecipeError(f"a recipe is a name, a text or a Recipe, not {type(recipe).__name__}")
    if ":" in recipe:
        return Recipe.parse(recipe)
    if match := _HALO_NAME.fullmatch(recipe):
        return halo(match[1], match[2] or _HALO_DEFAULTS[match[1]], recipe)
    by_name = {r.name: r for r in RECIPES}
    name = ALIASES.get(recipe, recipe)
    if name not in by_name:
        raise RecipeError(f"unknown recipe {recipe!r}.{near_matches(recipe, [*by_name, *ALIASES])}")
    return by_name[name]
