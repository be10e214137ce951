"""Plan, Step and the runner. The runner knows no pass: a pass is a plain function `(graph, plan) -> None`."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.graph import CodeGen

from lpcompile.joint import Joint, Site, insert_call, size_hint, verify
from lpcompile.kernel_cost import ALONE, Readers
from lpcompile.recipe import Gemm, Options, Recipe, Role
from lpcompile.target import Target

Pass = Callable[[Graph, "Plan"], None]


@dataclass
class Decision:
    """What becomes of one GEMM, and why. `gemm` is what the recipe asks for, None where it stays in high precision; `node` the
    GEMM's name in the graph as traced (a pass that replaces it updates `site.nodes`)."""

    key: str
    fqn: str
    role: Role | None
    node: str
    m: Any
    n: Any
    k: Any
    converted: bool
    reason: str
    gemm: Gemm | None = None
    site: Site | None = None
    batch: Any = 1
    dtype: torch.dtype | None = None
    # Who else reads the quantisations of a and b: their casts are paid for together.
    readers: tuple[Readers, Readers] = ALONE
    # Which casts feed the converted GEMM, by operand ("a", "b"): "<base node>|<cast>". The quantize pass fills it in.
    casts: dict[str, str] = field(default_factory=dict)

    def is_b(self, base: Node) -> bool:
        """True for the operand that the recipe calls b: the weight in fprop and dgrad, the input in wgrad."""
        assert self.site is not None
        return base is (self.site.x if self.role is Role.WGRAD else self.site.w).node


@dataclass(frozen=True)
class RotationCount:
    """Rotations of a graph: asked for by the recipe (each operand of each GEMM, each output); then after sharing and moving,
    those that ride inside a quantisation and those that are kernels of their own. moved: what was moved, and what it saved."""

    asked: int
    riding: int
    own: int
    moved: tuple[str, ...] = ()


@dataclass
class Plan:
    """Everything that the passes know besides the graph.

    params: parameter name by placeholder name. frozen: placeholders of parameters that nobody trains in this graph. seed: the
    node that draws the step's seed, once a pass needed one.
    """

    recipe: Recipe
    options: Options
    target: Target
    params: Mapping[str, str] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    joint: Joint = field(default_factory=lambda: Joint([]))
    decisions: list[Decision] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seed: Node | None = None
    rotations: RotationCount | None = None

    def converted(self) -> dict[Node, Decision]:
        """The GEMMs to be converted, as they stand in the graph now."""
        return {d.site.nodes[d.role]: d for d in self.decisions if d.converted and d.site is not None and d.role is not None}

    def replaced(self, old: Node, new: Node) -> None:
        """Notes that a GEMM was rewritten: the result that a next layer's GEMMs read is another node now."""
        for site in self.joint.sites:
            site.x, site.w = (replace(each, node=new) if each.node is old else each for each in (site.x, site.w))

    def decision(self, site: Site, role: Role) -> Decision | None:
        """The decision on one GEMM of a site where it is converted."""
        return next((d for d in self.decisions if d.converted and d.site is site and d.role is role), None)

    def note_cast(self, quantize: Node, text: str) -> None:
        """Adds to the reason of each GEMM that a quantisation feeds."""
        info = quantize.meta["lowprec"]
        for decision in self.decisions:
            if f"{info['base']}|{info['cast']}" in decision.casts.values():
                decision.reason += f"; {text}"


def draw_seed(graph: Graph, plan: Plan) -> Node:
    """The step's one seed, drawn before the first GEMM. Saved, never recomputed: a second draw would differ."""
    if plan.seed is None:
        sites = {d.site.nodes[Role.FPROP]: d.site for d in plan.decisions if d.converted and d.site is not None}
        anchor = next(node for node in graph.nodes if node in sites)
        plan.seed = insert_call(graph, anchor, torch.ops.lowprec.draw_seed.default, (sites[anchor].x.node,))
        for key in ("recompute", "ac_graph_id"):
            plan.seed.meta.pop(key, None)
    return plan.seed


@dataclass(frozen=True)
class Step:
    """A pass with its name and the reason why it stands where it stands."""

    name: str
    run: Pass
    reason: str = ""

    @staticmethod
    def of(entry: Any) -> Step:
        """A Step, or a user's plain function under its own name."""
        if isinstance(entry, Step):
            return entry
        return Step(getattr(entry, "__name__", type(entry).__name__), entry, inspect.getdoc(entry) or "")

    @property
    def digest(self) -> str:
        """Changes with the pass's source, so that a compile cache never serves another version's result."""
        try:
            text = inspect.getsource(inspect.unwrap(self.run))
        except (OSError, TypeError):
            text = f"{getattr(self.run, '__module__', '')}.{getattr(self.run, '__qualname__', repr(self.run))}"
        return hashlib.sha256(f"{self.name}\n{text}".encode()).hexdigest()


@dataclass(frozen=True)
class Launch:
    """One kernel of ours in the finished graph, or a product that stayed in high precision.

    phase: `forward` or `backward`. family: of its Kernel, or the operator where that is none. moved, least: bytes that it
    moves, and that no kernel can do without; time: predicted microseconds. rules: of the fuser, in the order in which they
    shaped it. sites: the GEMMs that it is or serves, "layers.0.fc1 fprop". reads: the matrices that a cast reads.
    """

    phase: str
    family: str
    kernel: str
    sizes: tuple[str, ...]
    moved: float
    least: float
    time: float
    rules: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()


@dataclass
class Trace:
    """What a pipeline did to one graph: the code before the first pass and after each one, the final plan, the launches."""

    plan: Plan
    stages: list[tuple[str, str]] = field(default_factory=list)
    saved: list[dict[str, Any]] = field(default_factory=list)
    sqnr: dict[str, float] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)

    def graph_after(self, name: str) -> str:
        """Readable code of the graph after the pass `name` ("input": before the first)."""
        return dict(self.stages)[name]


_CAPTURES: list[list[Trace]] = []


@contextlib.contextmanager
def capture() -> Iterator[list[Trace]]:
    """Collects the Trace of every graph that is compiled inside; compile caches are bypassed so that none is missed."""
    seen: list[Trace] = []
    _CAPTURES.append(seen)
    try:
        yield seen
    finally:
        _CAPTURES.remove(seen)


def capturing() -> bool:
    """True inside a `capture`."""
    return bool(_CAPTURES)


def readable(graph: Graph) -> str:
    """The graph as Python source: one function of its flat inputs, returning its flat outputs."""
    tree_codegen = graph._codegen
    graph.set_codegen(CodeGen())
    try:
        return graph.python_code("self").src
    finally:
        graph.set_codegen(tree_codegen)


def run(graph: Graph, steps: tuple[Step, ...], plan: Plan) -> Trace:
    """Runs the steps in order; verifies after the last one, and after each one while somebody watches."""
    trace = Trace(plan)
    directory = os.environ.get("LPCOMPILE_DIR")
    watched = capturing() or directory is not None
    if watched:
        trace.stages.append(("input", readable(graph)))
        programs = [program(graph, "the traced graph")] if directory else []
    for index, step in enumerate(steps):
        step.run(graph, plan)
        if watched or index == len(steps) - 1:
            verify(graph, step.name)
        if watched:
            trace.stages.append((step.name, readable(graph)))
            if directory:
                programs.append(program(graph, f"after {step.name}: {step.reason}"))
    for seen in _CAPTURES:
        seen.append(trace)
    if directory:
        _write_artifacts(pathlib.Path(directory), trace, programs)
    return trace


def program(graph: Graph, title: str) -> str:
    """The graph as a program that runs on random inputs of the traced shapes."""
    lines = [f"        {_example(node)}," for node in graph.nodes if node.op == "placeholder"]
    body = readable(graph)
    imports = "import torch\nfrom torch import device, inf, nan  # noqa: F401\nimport lpcompile.ops  # noqa: F401\n"
    call = "def main():\n    args = [\n" + "\n".join(lines) + "\n    ]\n    for out in forward(None, *args):\n"
    call += "        print(getattr(out, 'shape', out))\n\n\nif __name__ == '__main__':\n    main()\n"
    return f'"""{title}"""\n{imports}\n{body}\n\n{call}'


def _example(node: Node) -> str:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return str(size_hint(value))
    shape = [size_hint(s) for s in value.shape]
    device = "cuda" if value.device.type == "cuda" else "cpu"
    if value.dtype.is_floating_point:
        return f"torch.randn({shape}, device='{device}').to({value.dtype})"
    return f"torch.zeros({shape}, dtype={value.dtype}, device='{device}')"


def _write_artifacts(root: pathlib.Path, trace: Trace, programs: list[str]) -> None:
    digest = hashlib.sha256("".join(programs).encode()).hexdigest()[:12]
    folder = root / f"{trace.plan.recipe.name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    for index, ((name, _), text) in enumerate(zip(trace.stages, programs, strict=True)):
        # Written aside and renamed: a reader or a second process never sees half a file.
        aside = folder / f".{os.getpid()}.{index}"
        aside.write_text(text)
        aside.replace(folder / f"{index:02d}_{name}.py")
