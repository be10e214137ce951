"""`torch.compile(model, backend="lowprec")`: the entry point and the two executors.

    torch.compile -> lowprec -> compile_fx(joint_custom_pre_pass = our pipeline) -> partition -> Inductor -> lowprec:: ops

The reference executor runs the same rewritten and partitioned graphs op by op, every lowprec op by its reference meaning:
it is the oracle of the first.
"""

from __future__ import annotations

import functools
import hashlib
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Interpreter, Node

from lpcompile import launches, once, ops, pipeline
from lpcompile.codegen import launch, reveal
from lpcompile.errors import OptionError, near_matches
from lpcompile.joint import clean_name, parameter_of, size_hint
from lpcompile.passes import PIPELINE
from lpcompile.pipeline import Plan, Step, Trace
from lpcompile.recipe import Executor, Options, Recipe
from lpcompile.recipes import find_recipe
from lpcompile.target import Target, find_target


def lowprec(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compiles a Dynamo graph with its linear layers in low precision. `options`: see `recipe.Options`.

    Raises OptionError, RecipeError, TargetError for what the user mistyped, StrictError under `strict=True`.
    """
    chosen = Options.of(options)
    recipe = find_recipe(chosen.recipe)
    target = find_target(chosen.target, _device(example_inputs))
    if target.name != "cpu" and (torch.cuda.is_available() or launch.interpreting()):
        launch.install()
    steps = tuple(Step.of(entry) for entry in (PIPELINE if chosen.passes is None else chosen.passes))
    patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **chosen.inductor}
    untouched = recipe.empty and chosen.passes is None and not pipeline.capturing()
    parameters = _parameters(gm, example_inputs)
    frozen = frozenset(name for index, name in parameters.items() if not example_inputs[index].requires_grad)
    compiler = _Compiler(recipe, chosen, target, steps, parameters, frozen)
    if chosen.executor is Executor.REFERENCE:
        return compiler.reference(gm, example_inputs)
    if untouched:
        return _compile_fx(gm, example_inputs, patches)
    return compiler.inductor(gm, example_inputs, patches)


def pipeline_with(*passes: Any, after: str | None = None, before: str | None = None) -> tuple[Step, ...]:
    """The standard pipeline with a user's own passes `(graph, plan) -> None` after or before the named step.

    Default: at the end. Raises OptionError for an unknown step name.
    """
    names = [step.name for step in PIPELINE]
    for name in (after, before):
        if name is not None and name not in names:
            raise OptionError(f"no step {name!r} in the pipeline.{near_matches(name, names)}")
    position = names.index(before) if before else names.index(after) + 1 if after else len(names)
    return (*PIPELINE[:position], *(Step.of(p) for p in passes), *PIPELINE[position:])


def _device(inputs: Sequence[Any]) -> torch.device:
    for value in inputs:
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device("cpu")


def _parameters(gm: GraphModule, inputs: Sequence[Any]) -> dict[int, str]:
    """Parameter name by input position. Dynamo passes parameters as inputs and knows where each came from."""
    found: dict[int, str] = {}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for index, (node, value) in enumerate(zip(placeholders, inputs, strict=False)):
        if isinstance(value, torch.nn.Parameter):
            source = getattr(node.meta.get("grapharg"), "source", None) or getattr(node, "_dynamo_source", None)
            name = source.name if source is not None else node.name
            found[index] = clean_name(name() if callable(name) else name)
    return found


def _graph_parameters(graph: Graph, parameters: dict[int, str]) -> dict[str, str]:
    """Parameter name by placeholder name in the graph that AOTAutograd traced."""
    found: dict[str, str] = {}
    position = 0
    for node in graph.nodes:
        if node.op != "placeholder" or "tangents" in node.name:
            continue
        index = getattr(node.meta.get("desc"), "idx", position)
        position += 1
        if index in parameters:
            found[node.name] = parameters[index]
    return found


@functools.cache
def source_digest() -> str:
    """Digest of lpcompile's own source: part of every cache key."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).resolve().parent.rglob("*.py")):
        digest.update(path.read_bytes())
    for folder in ("passes", "codegen"):
        for path in sorted((pathlib.Path(__file__).resolve().parent / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _compile_fx(gm: GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = compile_fx(gm, inputs, config_patches=patches)  # type: ignore[assignment]
    return compiled


class _Compiler:
    """One Dynamo graph's way through the pipeline."""

    def __init__(
        self,
        recipe: Recipe,
        options: Options,
        target: Target,
        steps: tuple[Step, ...],
        parameters: dict[int, str],
        frozen: frozenset[str],
    ) -> None:
        self.recipe, self.options, self.target, self.steps = recipe, options, target, steps
        self.parameters, self.frozen = parameters, frozen

    def transform(self, graph: Graph) -> Trace:
        """Runs the pipeline on a joint or inference graph, in place."""
        params = _graph_parameters(graph, self.parameters)
        # Nothing is trained in an inference graph, which is the one without a partition to come.
        inference = not any("partitioner_tag" in node.meta for node in graph.nodes)
        frozen = frozenset(node for node, name in params.items() if inference or name in self.frozen)
        plan = Plan(self.recipe, self.options, self.target, params, frozen)
        trace = pipeline.run(graph, self.steps, plan)
        if pipeline.capturing():
            launches.annotate(graph, plan)
            trace.launches = launches.launches_of([graph], self.target)
        for note in plan.notes:
            warnings.warn(note, stacklevel=2)
        return trace

    # ---- Inductor ------------------------------------------------------------------------------------------------

    def inductor(self, gm: GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
        """Inductor, with the pipeline in its joint-graph slot and the user's own pass, if any, before it."""
        user = patches.pop("joint_custom_pre_pass", None) or inductor_config.joint_custom_pre_pass
        patches = {**patches, "joint_custom_pre_pass": _Slot(self, user, _names(gm))}
        patches = reveal.patched(patches, self.target, source_digest())
        once.protect()
        if pipeline.capturing():
            patches["force_disable_caches"] = True
        return _compile_fx(gm, inputs, patches)

    # ---- reference -----------------------------------------------------------------------------------------------

    def reference(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The same graphs, op by op in PyTorch."""
        traces: list[Trace] = []

        def partition(joint: GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule]:
            traces.append(self.transform(joint.graph))
            joint.recompile()
            forward, backward = min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)
            if pipeline.capturing():
                # What was merged, dropped and computed again is known now.
                traces[-1].launches = launches.launches_of([forward.graph, backward.graph], self.target)
            traces[-1].saved = saved_tensors(forward, kwargs["num_fwd_outputs"], traces[-1].plan)
            return forward, backward

        def run(module: GraphModule, _inputs: Any) -> Callable[..., Any]:
            return _boxed(module, traces)

        def inference(module: GraphModule, _inputs: Any) -> Callable[..., Any]:
            traces.append(self.transform(module.graph))
            module.recompile()
            return _boxed(module, traces)

        backend = aot_autograd(
            fw_compiler=run,
            bw_compiler=run,
            inference_compiler=inference,
            partition_fn=partition,
            decompositions=select_decomp_table,
            keep_inference_input_mutations=True,
        )
        compiled: Callable[..., Any] = backend(gm, inputs)
        return compiled


def _names(gm: GraphModule) -> str:
    """Digest of the module names of a graph's calls: decisions depend on them, the graph's own cache key does not."""
    digest = hashlib.sha256()
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        digest.update(repr(list(stack.values())[-1][0] if stack else "").encode())
    return digest.hexdigest()


class _Slot(CustomGraphPass):
    """The pipeline as Inductor's joint pass; `uuid` is what lets both compile caches hit."""

    def __init__(self, compiler: _Compiler, user: Any, names: str) -> None:
        self.compiler, self.user, self.names = compiler, user, names

    def __call__(self, graph: Graph) -> None:
        if self.user is not None:
            self.user(graph)
        self.compiler.transform(graph)

    def uuid(self) -> Any:
        user = None
        if self.user is not None:
            user = self.user.uuid() if hasattr(self.user, "uuid") else None
            if user is None:
                return None
        c = self.compiler
        steps = tuple(step.digest for step in c.steps)
        options = (
            str(c.recipe),
            c.recipe.name,
            c.options.keep,
            c.options.strict,
            c.options.always,
            c.options.prefix,
            c.target.name,
        )
        parameters = (tuple(sorted(c.parameters.items())), tuple(sorted(c.frozen)))
        return (source_digest(), options, steps, parameters, self.names, user)


class _Reference(Interpreter):
    """Runs a graph with the reference meaning of each lowprec op, and measures quantisation errors for the trace."""

    traces: list[Trace]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(target, "namespace", None) != "lowprec":
            return super().call_function(target, args, kwargs)
        return ops.REFERENCE[target._opname](*args, **kwargs)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if pipeline.capturing() and n.target in (torch.ops.lowprec.quantize.default, once.OP) and "lowprec" in n.meta:
            source, cast, *seeds = self.fetch_args_kwargs_from_env(n)[0]
            if n.target is once.OP:
                shape, dtype = seeds
                source, seeds = source.reshape(shape).to(dtype), []
            for trace in self.traces:
                trace.sqnr[f"{n.meta['lowprec']['base']}|{cast}"] = ops.sqnr(source, result, cast, *seeds)
        return result


def _boxed(module: GraphModule, traces: list[Trace]) -> Callable[..., Any]:
    def run(args: list[Any]) -> Any:
        interpreter = _Reference(module)
        interpreter.traces = traces
        values = list(args)
        args.clear()
        return interpreter.run(*values)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def saved_tensors(forward: GraphModule, num_outputs: int, plan: Plan) -> list[dict[str, Any]]:
    """What the forward graph keeps for backward: name, bytes, dtype, and whose codes they are."""
    output = next(n for n in forward.graph.nodes if n.op == "output")
    saved = []
    for node in output.args[0][num_outputs:]:
        if not isinstance(node, Node) or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        value, info = node.meta["val"], node.meta.get("lowprec", {})
        saved.append(
            {
                "name": node.name,
                "bytes": size_hint(value.numel()) * value.element_size(),
                "dtype": str(value.dtype).removeprefix("torch."),
                "parameter": parameter_of(node, plan.params) is not None and node.op == "placeholder",
                "info": info if "part" in info else None,
            }
        )
    return saved
