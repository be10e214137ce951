"""The compiler on one screen: graph -> graph passes, in order, each with the reason why it stands there."""

from __future__ import annotations

from lpcompile.passes.assign import assign
from lpcompile.passes.canonicalize import canonicalize
from lpcompile.passes.fuse import fuse
from lpcompile.passes.hoist import hoist
from lpcompile.passes.quantize import quantize
from lpcompile.passes.rotate import rotate
from lpcompile.passes.save import save
from lpcompile.passes.thaw import thaw
from lpcompile.pipeline import Step

assert __name__ == "lpcompile.passes", "import it as lpcompile.passes, not as passes"

PIPELINE = (
    Step("canonicalize", canonicalize, "one node per view, so that sites and shared operands are found by identity"),
    Step("assign", assign, "decide, for each GEMM, whether and how it is converted, and say why"),
    Step("rotate", rotate, "outliers are spread before anything is quantised; undone where the fewest bytes move"),
    Step("quantize", quantize, "operands become codes and scales, each once; GEMMs become scaled products"),
    Step("thaw", thaw, "weights stored as codes need no quantisation, or are decoded where they are read"),
    Step("hoist", hoist, "weights that nobody trains are quantised once, now that it is known how"),
    Step("save", save, "backward keeps codes and scales, and weights are quantised where they are read"),
    Step("fuse", fuse, "quantisations, products and their neighbours become launches, once everything else is settled"),
)
