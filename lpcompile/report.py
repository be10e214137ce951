"""What became of each GEMM: one line a site and role, totals, and why. Text (rich) and JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from lpcompile.cost import predict
from lpcompile.joint import size_hint
from lpcompile.pipeline import Decision, Trace
from lpcompile.recipe import Role


@dataclass(frozen=True)
class Row:
    """One GEMM. Sizes as traced; times in microseconds; sqnr in dB by operand; saved in bytes."""

    graph: int
    name: str
    role: str
    m: str
    n: str
    k: str
    a: str
    b: str
    converted: bool
    reason: str
    time_high: float
    time_low: float
    saved: int
    sqnr: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """Bytes that forward keeps for backward, over all graphs. parameters: kept anyway, no memory of their own."""

    codes: int
    other: int
    parameters: int


class Report:
    """The rows of one or more traces. `print()`, `text()`, `to_json()`, and `graph(pass_name)` for the rewritten graphs."""

    def __init__(self, traces: list[Trace], recipe: str, target: str) -> None:
        self.traces, self.recipe, self.target = traces, recipe, target
        self.rows = [_row(index, d, trace) for index, trace in enumerate(traces) for d in trace.plan.decisions]
        self.notes = sorted({note for trace in traces for note in trace.plan.notes})

    @property
    def converted(self) -> int:
        return sum(row.converted for row in self.rows)

    def reasons(self) -> Counter[str]:
        """How many GEMMs ended with each reason."""
        return Counter(row.reason for row in self.rows)

    def saved(self) -> Saved:
        items = [item for trace in self.traces for item in trace.saved]
        codes = sum(i["bytes"] for i in items if i["info"])
        parameters = sum(i["bytes"] for i in items if i["parameter"])
        return Saved(codes, sum(i["bytes"] for i in items) - codes - parameters, parameters)

    def graph(self, after: str = "save", index: int = 0) -> str:
        """Readable code of a graph after the named pass ("input": as traced)."""
        return self.traces[index].graph_after(after)

    def table(self) -> Table:
        """The rows as a rich table."""
        table = Table(title=f"{self.recipe} on {self.target}: {self.converted} of {len(self.rows)} GEMMs converted")
        for name in ("layer", "GEMM", "M x N x K", "a", "b", "us high>low", "saved", "SQNR dB", "what and why"):
            table.add_column(name, overflow="fold", justify="right" if name in ("us high>low", "saved") else "left")
        for row in self.rows:
            times = f"{row.time_high:.0f}>{row.time_low:.0f}" if row.converted else f"{row.time_high:.0f}"
            table.add_row(
                row.name,
                row.role,
                f"{row.m} x {row.n} x {row.k}",
                row.a,
                row.b,
                times,
                _bytes(row.saved) if row.saved else "",
                " ".join(f"{key} {value:.1f}" for key, value in row.sqnr.items()),
                row.reason,
                style=None if row.converted else "yellow" if row.reason.startswith("declined") else "dim",
            )
        return table

    def print(self, console: Console | None = None) -> None:
        """Prints the table, the totals and the notes."""
        console = console or Console()
        console.print(self.table())
        saved = self.saved()
        if saved.codes or saved.other:
            console.print(
                f"saved for backward: {_bytes(saved.codes)} of codes and scales, {_bytes(saved.other)} of everything else"
            )
        for note in self.notes:
            console.print(f"[yellow]note:[/yellow] {note}")

    def text(self, width: int = 160) -> str:
        """What `print` prints, as a string without colours."""
        console = Console(width=width, no_color=True, force_terminal=False)
        with console.capture() as captured:
            self.print(console)
        return captured.get()

    def to_json(self) -> str:
        """The rows, reasons, notes and saved bytes as JSON."""
        content: dict[str, Any] = {
            "recipe": self.recipe,
            "target": self.target,
            "rows": [asdict(row) for row in self.rows],
            "reasons": dict(self.reasons()),
            "saved": asdict(self.saved()),
            "notes": self.notes,
        }
        return json.dumps(content, indent=1)


def _row(index: int, decision: Decision, trace: Trace) -> Row:
    gemm = decision.gemm if decision.converted else None
    times = predict(decision, trace.plan.target)
    site = decision.key
    role = str(decision.role or "backward")
    # The codes of a site are saved for its own backward GEMMs; count them once, at its fprop.
    saved = sum(i["bytes"] for i in trace.saved if i["info"] and i["info"]["site"] == site) if role == Role.FPROP else 0
    return Row(
        graph=index,
        name=decision.fqn if decision.key.partition("#")[2] == "" else f"{decision.fqn}#{decision.key.partition('#')[2]}",
        role=role,
        m=_size(decision.m),
        n=_size(decision.n),
        k=_size(decision.k),
        a=str(gemm.a or "hp") if gemm else "",
        b=str(gemm.b or "hp") if gemm else "",
        converted=decision.converted,
        reason=decision.reason,
        time_high=times.high,
        time_low=times.low if decision.converted else times.high,
        saved=saved,
        sqnr={name: trace.sqnr[cast] for name, cast in sorted(decision.casts.items()) if cast in trace.sqnr},
    )


def _size(size: Any) -> str:
    if size is None:
        return "?"
    return str(size) if str(size).isdecimal() else f"{size}={size_hint(size)}"


def _bytes(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"

