"""Opaque `lowprec::fused` nodes become Triton kernels that Inductor sees: it allocates, plans and launches them itself.

    values = fused([codes], "decode ...", ...)   ->   out = empty(...); values = triton_kernel(codes=codes, values=out, ...)

The nodes come into the graph after AOTAutograd, so `torch.library.triton_op`, which is taken apart there, does not reach them;
this pass runs behind Inductor's own instead. It traces the generated `launch` with recorders in place of its jit functions,
so that a generated module stays what one would write by hand.

What stays opaque, and why:
- kernels with tensor descriptors: torch 2.11 cannot find out which of them are written and takes all arguments to be, graph
  inputs too, which rules CUDA graphs out; torch 2.13 with Triton 3.9 finds none and drops the kernel as dead code;
- kernels whose arithmetic the default options change: Inductor hands no options of ours to the compiler, and Triton's default
  contracts a multiplication and an addition into one rounding, so that codes would no longer be the reference's;
- dynamic shapes.
"""

from __future__ import annotations

import operator
import os
import re
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from lpcompile.codegen import module
from lpcompile.codegen.compile import compile_entry
from lpcompile.codegen.example import example
from lpcompile.codegen.launch import trusted
from lpcompile.codegen.source import Source
from lpcompile.errors import KernelError
from lpcompile.fused import parse_kernel
from lpcompile.kernel import GemmKernel
from lpcompile.launches import kernel_sizes
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen.reveal", "import it as lpcompile.codegen.reveal, not as codegen.reveal"

Emitted = Callable[[str, Sequence[Tensor], Sequence[int]], Source]


def patched(patches: dict[str, Any], target: Target, digest: str) -> dict[str, Any]:
    """Inductor's options with this pass behind the user's own, where LPCOMPILE_REVEAL=1 asks for it. digest: of the sources."""
    if os.environ.get("LPCOMPILE_REVEAL") != "1" or not target.name.startswith("sm_"):
        return patches
    user = patches.get("post_grad_custom_post_pass") or inductor_config.post_grad_custom_post_pass
    return {**patches, "post_grad_custom_post_pass": Reveal(user, target, digest)}


class Reveal(CustomGraphPass):
    """`reveal` as Inductor's last pass of a user's; `uuid` is what lets its caches hit."""

    def __init__(self, user: Any, target: Target, digest: str) -> None:
        self.user, self.target, self.digest = user, target, digest

    def __call__(self, graph: Graph) -> None:
        if self.user is not None:
            self.user(graph)
        reveal(graph, self._emitted)

    def uuid(self) -> Any:
        user = None
        if self.user is not None:
            user = self.user.uuid() if hasattr(self.user, "uuid") else None
            if user is None:
                return None
        return (self.target.name, self.digest, user)

    def _emitted(self, text: str, inputs: Sequence[Tensor], sizes: Sequence[int]) -> Source:
        kernel, device = parse_kernel(text), inputs[0].device
        counted = kernel_sizes(kernel, inputs, sizes)
        with unset_fake_temporarily():
            return trusted(kernel, counted, self.target, device, lambda: example(kernel, counted, device))


def reveal(graph: Graph, emitted: Emitted) -> int:
    """Replaces the nodes that can be, and returns their number. emitted: the Source for a Kernel's text, its inputs (fake
    tensors) and sizes; KernelError leaves the node as it is."""
    count = 0
    for node in list(graph.find_nodes(op="call_function", target=torch.ops.lowprec.fused.default)):
        try:
            traced = _traced(node, emitted)
        except KernelError:
            continue
        if traced is not None:
            _inline(graph, node, traced)
            count += 1
    return count


def _traced(node: Node, emitted: Emitted) -> GraphModule | None:
    """The launch of a node as a graph of its tensors; None where it has to stay opaque."""
    arguments: Sequence[Any] = (*node.args, *_DEFAULTS[len(node.args) :])
    inputs, text, sizes, seed, uses, spins = arguments
    if node.kwargs or not _static([*inputs, *sizes, *([] if seed is None else [seed])]):
        return None
    values = [each.meta["val"] for each in inputs]
    source = emitted(text, values, sizes)
    if source.schedule.tma or source.schedule.specialized or source.schedule.vendor or not same_arithmetic(source):
        return None

    def launch(*tensors: Tensor) -> list[Tensor]:
        own = tensors[len(values)] if seed is not None else None
        return _recording(source)(list(tensors[: len(values)]), sizes, own, uses, spins)

    with values[0].fake_mode:
        traced = make_fx(launch, select_decomp_table())(*values, *([] if seed is None else [seed.meta["val"]]))
    _functionalize(traced.graph)
    return traced


_DEFAULTS: tuple[Any, ...] = (None, None, [], None, [], [])


def _static(arguments: Sequence[Any]) -> bool:
    """True where all sizes are numbers."""
    values = [each.meta.get("val") if isinstance(each, Node) else each for each in arguments]
    return all(
        isinstance(each, int) or (isinstance(each, Tensor) and all(isinstance(size, int) for size in each.shape))
        for each in values
    )


def same_arithmetic(source: Source) -> bool:
    """True where the default options of a compilation do not change what is computed beyond the kernel's tolerance."""
    if isinstance(source.kernel, GemmKernel):
        return True
    entries = [compile_entry(source, entry, source.target, contract=True) for entry in source.entries]
    return not any(re.search(r"\bfma\.rn", one.ptx) for one in entries)


# ---- recording a launch ------------------------------------------------------------------------------------------


class _Recorder:
    """Stands for a jit function: a call with a grid becomes a node."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def call(*args: Any, **named: Any) -> None:
            self._record((*grid, 1, 1)[:3], {**dict(zip(self.kernel.arg_names, args, strict=True)), **named})

        return call

    def _record(self, grid: tuple[int, ...], named: dict[str, Any]) -> None:
        import triton
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation

        options = {name: named.pop(name) for name in ("num_warps", "num_stages")}
        # Inductor hands neither to the compiler; the second is a matter of speed.
        named.pop("enable_fp_fusion")
        named.pop("maxnreg", None)
        tuned = triton.autotune(configs=[triton.Config({}, **options)], key=[])(self.kernel)
        triton_kernel_wrapper_mutation(
            kernel_idx=kernel_side_table.add_kernel(tuned),
            constant_args_idx=kernel_side_table.add_constant_args({}),
            grid=[grid],
            tma_descriptor_metadata={},
            kwargs=named,
        )


def _recording(source: Source) -> Callable[..., list[Tensor]]:
    """The module's `launch`, with recorders in place of jit functions."""
    generated = module.load(source)
    names = {entry.name for entry in source.entries}
    namespace: dict[str, Any] = dict(vars(generated))
    for name, value in vars(generated).items():
        if isinstance(value, types.FunctionType):
            namespace[name] = types.FunctionType(value.__code__, namespace, name, value.__defaults__, value.__closure__)
        elif name in names:
            namespace[name] = _Recorder(value)
    # Inductor hands contiguous, aligned buffers over.
    namespace["ready"] = Tensor.contiguous
    launch: Callable[..., list[Tensor]] = namespace["launch"]
    return launch


def _functionalize(graph: Graph) -> None:
    """Kernels that write into what the launch allocated become kernels that return it, as graphs have them at this point."""
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional, triton_kernel_wrapper_mutation

    written: dict[Node, Node] = {}
    for node in list(graph.nodes):
        node.args, node.kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda each: _latest(each, written))
        if node.target is not triton_kernel_wrapper_mutation:
            continue
        named: dict[str, Any] = dict(node.kwargs["kwargs"])
        own = [name for name, each in named.items() if isinstance(each, Node) and _allocated(each)]
        with graph.inserting_before(node):
            call = graph.call_function(triton_kernel_wrapper_functional, (), {**node.kwargs, "tensors_to_clone": own})
            call.meta["val"] = {name: named[name].meta["val"] for name in own}
            for name in own:
                written[named[name]] = graph.call_function(operator.getitem, (call, name))
                written[named[name]].meta["val"] = named[name].meta["val"]
        graph.erase_node(node)


def _latest(node: Node, written: dict[Node, Node]) -> Node:
    while node in written:
        node = written[node]
    return node


def _allocated(node: Node) -> bool:
    """True for memory of the launch's own, which a kernel may write. Raises KernelError for a part of it under another name."""
    if not getattr(node.target, "is_view", False):
        return node.op == "call_function"
    base = node
    while getattr(base.target, "is_view", False):
        base = base.all_input_nodes[0]
    if base.op == "call_function":
        raise KernelError("a kernel writes through a view: its launch stays opaque")
    return False


def _inline(graph: Graph, node: Node, traced: GraphModule) -> None:
    """Puts the traced launch in place of a node, whose users take the outputs apart."""
    given: Sequence[Any] = node.args
    arguments = iter([*given[0], *given[3:4]])
    copied: dict[Node, Any] = {}
    # What eager mode passed to the operator says nothing of the arguments of its kernels.
    common = {key: value for key, value in node.meta.items() if key != "eager_input_vals"}
    with graph.inserting_before(node):
        for each in traced.graph.nodes:
            if each.op == "placeholder":
                copied[each] = next(arguments)
            elif each.op != "output":
                copied[each] = graph.node_copy(each, copied.__getitem__)
                copied[each].meta = {**common, **each.meta}
    outputs = next(each for each in traced.graph.nodes if each.op == "output").args[0]
    for user in list(node.users):
        user.replace_all_uses_with(copied[outputs[user.args[1]]])
        graph.erase_node(user)
    graph.erase_node(node)
