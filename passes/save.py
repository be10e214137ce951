"""What backward keeps: codes and scales, never a high-precision copy of an operand.

The min-cut partitioner never recomputes a `quantize` (it is no fusible op), so codes made in the forward pass are saved as
they are. Two things are left to say:

- a cast of a parameter that only backward reads is made in backward: the parameter is alive anyway and its codes would
  occupy memory in between for nothing;
- under activation checkpointing the casts carry the region's own recompute policy (copied with the GEMM's metadata).
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from lpcompile.joint import is_backward, parameter_of
from lpcompile.pipeline import Plan

assert __name__ == "lpcompile.passes.save", "import it as lpcompile.passes, not as passes"


def save(graph: Graph, plan: Plan) -> None:
    """Marks casts of parameters that only backward reads as belonging to backward."""
    for node in graph.nodes:
        if node.target is not torch.ops.lowprec.quantize.default or not is_backward(node):
            continue
        source = node.args[0]
        assert isinstance(source, Node)
        if parameter_of(source, plan.params) is not None:
            for made in (node, *node.users):
                made.meta["partitioner_tag"] = "must_be_in_backward"
