"""Which GEMM is converted, which stays as it is, and why. The only place where such a decision is made."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.fx import Graph, Node

from lpcompile.carrier import CARRIER
from lpcompile.cost import borne, predict
from lpcompile.errors import StrictError
from lpcompile.joint import GEMMS, Site, find_sites, gemm_operands, module_name
from lpcompile.kernel_cost import Readers
from lpcompile.pipeline import Decision, Plan
from lpcompile.recipe import Gemm, Role, glob_to_regex, last_blocks

assert __name__ == "lpcompile.passes.assign", "import it as lpcompile.passes, not as passes"

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def assign(graph: Graph, plan: Plan) -> None:
    """Fills `plan.joint` and `plan.decisions`. Raises StrictError under `strict` where a linear layer's GEMM is declined."""
    plan.joint = find_sites(graph, plan.params)
    plan.decisions = []
    counts = _count_readers(plan)
    for site in plan.joint.sites:
        for role in Role:
            if role in site.nodes:
                plan.decisions.append(_decide(site, role, plan, counts))
    plan.decisions += [_stray(node, "its forward GEMM was not found") for node in plan.joint.strays]
    plan.decisions += [_stray(node, "grouped GEMMs are not converted") for node in plan.joint.grouped]
    _check_globs(plan)
    declined = [d for d in plan.decisions if not d.converted and d.reason.startswith("declined")]
    if plan.options.strict and declined:
        lines = "\n".join(f"  {d.key} {d.role or ''}: {d.reason}" for d in declined)
        raise StrictError(
            f"strict=True and {len(declined)} GEMM(s) were declined:\n{lines}\nAdd them to `keep` or drop strict."
        )


def _count_readers(plan: Plan) -> Counter[tuple[Role, Node]]:
    """How many products of a role would read a tensor's quantisations; the gradient of an output goes by fprop's node."""
    counts: Counter[tuple[Role, Node]] = Counter()
    for site in plan.joint.sites:
        for role in Role:
            if role in site.nodes and site.weight is not None and plan.recipe.gemm(role) is not None:
                counts.update((role, node) for node in _tensors(site, role))
    return counts


def _tensors(site: Site, role: Role) -> tuple[Node, Node]:
    """What the recipe calls a and b in a product."""
    gradient = site.nodes[Role.FPROP]
    a = site.x.node if role is Role.FPROP else gradient
    return a, site.x.node if role is Role.WGRAD else site.w.node


def _readers(site: Site, role: Role, counts: Counter[tuple[Role, Node]]) -> tuple[Readers, Readers]:
    a, b = (
        Readers(max(counts[role, node], 1), max(sum(counts[other, node] for other in Role), 1)) for node in _tensors(site, role)
    )
    return a, b


def _decide(site: Site, role: Role, plan: Plan, counts: Counter[tuple[Role, Node]]) -> Decision:
    node = site.nodes[role]
    gemm = plan.recipe.gemm(role)
    left, right = gemm_operands(node)
    m, k = left.meta["val"].shape[-2:]
    decision = Decision(
        site.key,
        full_name(site, plan),
        role,
        node.name,
        m,
        right.meta["val"].shape[-1],
        k,
        converted=False,
        reason="",
        gemm=gemm,
        site=site,
        batch=left.meta["val"].shape[0] if len(left.meta["val"].shape) == 3 else 1,
        dtype=node.meta["val"].dtype,
        readers=_readers(site, role, counts),
    )
    refusal = _refusal(site, role, node, gemm, decision, plan)
    decision.converted = refusal is None
    decision.reason = refusal or _how(gemm, plan)
    return decision


def _refusal(site: Site, role: Role, node: Node, gemm: Gemm | None, decision: Decision, plan: Plan) -> str | None:
    """Why a GEMM stays as it is, or None. `declined` marks what the recipe covers and we could not do."""
    if site.weight is None:
        return "kept: activation x activation"
    if glob := _kept(decision.fqn, plan):
        return f"kept: its name matches {glob!r}"
    if decision.fqn.startswith(_last_blocks(plan)):
        return f"kept: one of the last {plan.recipe.keep_last:.0%} of the blocks"
    if gemm is None:
        return f"kept: the recipe leaves {role} in high precision"
    if site.problem:
        return f"declined: {site.problem}"
    dtypes = {operand.meta["val"].dtype for operand in gemm_operands(node)}
    if unsupported := sorted(str(d) for d in dtypes if d not in DTYPES):
        return f"declined: dtype {', '.join(unsupported)} (supported: bfloat16, float16, float32)"
    if any(isinstance(size, int) and size == 0 for size in (decision.m, decision.n, decision.k)):
        return f"declined: empty ({decision.m} x {decision.n} x {decision.k})"
    if any(value not in (1, 1.0) for value in node.kwargs.values()):
        return f"declined: {node.target} with {dict(node.kwargs)}"
    times = predict(decision, plan.target)
    if times.native and times.low >= times.high and not plan.options.always:
        return f"declined: predicted slower, {times.low:.1f} us against {times.high:.1f} us on {plan.target.name}"
    return None


def _how(gemm: Gemm | None, plan: Plan) -> str:
    assert gemm is not None
    native = plan.target.native(gemm.a, gemm.b)
    if borne(gemm, plan.target):
        return f"converted: as {CARRIER.elem} with the same values, {plan.target.name} has no instruction for its own"
    return f"converted: native {native}" if native else f"converted: decoded, {plan.target.name} has no such instruction"


def full_name(site: Site, plan: Plan) -> str:
    """The layer's name in the whole model: the option `prefix` completes it under regional compilation."""
    return ".".join(part for part in (plan.options.prefix, site.fqn) if part)


def _kept(fqn: str, plan: Plan) -> str | None:
    for glob in (*plan.recipe.keep, *plan.options.keep):
        if glob_to_regex(glob).match(fqn):
            return glob
    return None


def _last_blocks(plan: Plan) -> tuple[str, ...]:
    names = [full_name(site, plan) for site in plan.joint.sites if site.weight is not None]
    return last_blocks(names, plan.recipe.keep_last)


def _check_globs(plan: Plan) -> None:
    names = {d.fqn for d in plan.decisions}
    for glob in plan.options.keep:
        if not any(glob_to_regex(glob).match(name) for name in names):
            plan.notes.append(f"keep={glob!r} matches no GEMM of this graph; names are e.g. {', '.join(sorted(names)[:3])}")


def _stray(node: Node, reason: str) -> Decision:
    shapes: list[Any] = [None, None, None]
    if node.target in GEMMS:
        left, right = gemm_operands(node)
        shapes = [left.meta["val"].shape[-2], right.meta["val"].shape[-1], left.meta["val"].shape[-1]]
    name = module_name(node) or node.name
    m, n, k = shapes
    return Decision(name, name, None, node.name, m, n, k, converted=False, reason=f"kept: {reason}")
