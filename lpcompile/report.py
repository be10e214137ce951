"""What became of each GEMM: one line a site and role, totals, and why. Text (rich) and JSON."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from lpcompile import kernel_table
from lpcompile.cost import predict
from lpcompile.errors import OptionError, near_matches
from lpcompile.joint import size_hint
from lpcompile.launches import RAN_WITH
from lpcompile.pipeline import Decision, Launch, RotationCount, Trace
from lpcompile.recipe import Role
from lpcompile.texts import NUMBER, bytes_text, size_text, time_text

# Where nobody looks at a terminal, lines longer than its default of 80 columns do no harm and folded cells do.
WIDTH = 140
# Name, width that the column needs, and whether what is wider folds (the others never are).
_COLUMNS = (
    ("GEMM", 5, False),
    ("M x N x K", 12, True),
    ("casts a @ b", 12, True),
    ("us, was > now", 13, False),
    ("saved", 9, False),
    ("dB a/b", 9, False),
)
_STYLES = {"converted": "", "kept": "dim", "declined": "yellow"}


@dataclass(frozen=True)
class Row:
    """One GEMM. Sizes as traced, `batch` of them; a, b: the casts of its operands, with block and rounding by operand,
    and the rotation of both before.

    time_high, time_low: predicted microseconds as it was and as it is now, with the casts of its operands. saved:
    bytes of codes and scales that forward keeps for the site's backward; saved_high: bytes of those operands in high
    precision, parameters counting nothing (both at fprop). sqnr: dB by operand, inf where nothing is lost.
    """

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
    batch: str = "1"
    saved_high: int = 0
    block: dict[str, str] = field(default_factory=dict)
    rounding: dict[str, str] = field(default_factory=dict)
    rotation: str = ""

    @property
    def status(self) -> str:
        """`converted`, `kept` (as was asked) or `declined` (the recipe covers it and it was not done)."""
        if self.converted:
            return "converted"
        return "declined" if self.reason.startswith("declined") else "kept"

    @property
    def decoded(self) -> bool:
        """True where the target has no instruction for it and runs it on decoded operands."""
        return self.reason.startswith("converted: decoded")

    @property
    def why(self) -> str:
        """The reason in a few words: up to the first comma or bracket, without the word converted."""
        return re.split(r"[,(]", self.reason.removeprefix("converted: "), maxsplit=1)[0].strip()


@dataclass(frozen=True)
class Saved:
    """Bytes that forward keeps for backward, over all graphs. parameters: kept anyway, no memory of their own.

    high: what the operands behind `codes` would take in high precision.
    """

    codes: int
    other: int
    parameters: int
    high: int


class Report:
    """The rows of one or more traces. `print()`, `text()`, `to_json()`, and `graph(pass_name)` for the graphs."""

    def __init__(self, traces: list[Trace], recipe: str, target: str) -> None:
        self.traces, self.recipe, self.target = traces, recipe, target
        self.rows: list[Row] = []
        for index, trace in enumerate(traces):
            high = _saved_high(trace)
            self.rows += [_row(index, decision, trace, high) for decision in trace.plan.decisions]
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
        other = sum(i["bytes"] for i in items) - codes - parameters
        return Saved(codes, other, parameters, sum(row.saved_high for row in self.rows))

    def rotations(self) -> RotationCount | None:
        """Rotations over all graphs; None where the recipe has none."""
        counts = [trace.plan.rotations for trace in self.traces if trace.plan.rotations is not None]
        if not counts:
            return None
        moved = tuple(line for count in counts for line in count.moved)
        asked, riding, own = (sum(values) for values in zip(*((c.asked, c.riding, c.own) for c in counts), strict=True))
        return RotationCount(asked, riding, own, moved)

    @property
    def launches(self) -> list[Launch]:
        """The kernels of forward and backward in the order in which they run, and the products that stayed as they were."""
        return [launch for trace in self.traces for launch in trace.launches]

    @property
    def stages(self) -> list[str]:
        """Names that `graph` takes: "input" and each pass, in order."""
        return [name for name, _ in self.traces[0].stages] if self.traces else []

    def graph(self, after: str = "save", index: int = 0) -> str:
        """Readable code of a graph after the named pass ("input": as traced). Raises OptionError for an unknown one."""
        if after not in self.stages:
            raise OptionError(f"no graph after {after!r}.{near_matches(after, self.stages)}")
        if not 0 <= index < len(self.traces):
            raise OptionError(f"no graph {index}: there are {len(self.traces)}")
        return self.traces[index].graph_after(after)

    def lines(self, compact: bool = True) -> list[tuple[Row, int]]:
        """The rows with the number of GEMMs behind each.

        compact: rows that differ only in numbers inside the layer's name become one, with `*` for the numbers that
        differ, the sum of times and bytes and the smallest SQNR.
        """
        if not compact:
            return [(row, 1) for row in self.rows]
        groups: dict[tuple[str, ...], list[Row]] = {}
        first: dict[str, int] = {}
        for row in self.rows:
            pattern = NUMBER.sub("*", row.name)
            first.setdefault(pattern, len(first))
            shown = (row.role, row.batch, row.m, row.n, row.k, row.a, row.b, row.rotation, row.status, row.reason)
            groups.setdefault((pattern, *shown), []).append(row)
        roles = [*Role, "backward"]
        # A first layer without dgrad must not push the others' dgrad behind the next module.
        ordered = sorted(groups, key=lambda key: (first[key[0]], roles.index(key[1])))
        return [(_merge(groups[key]), len(groups[key])) for key in ordered]

    def table(self, compact: bool = True) -> Table:
        """The lines as a rich table; the numbers of the last column are those of `legend`."""
        lines = self.lines(compact)
        counts, graphs = compact and any(count > 1 for _, count in lines), not compact and len(self.traces) > 1
        title = Text(f"{self.recipe} on {self.target}: {self.converted} of {len(self.rows)} GEMMs converted")
        table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left")
        longest = max((len(row.name) for row, _ in lines), default=0)
        table.add_column("layer", overflow="fold", min_width=min(longest, 28))
        if counts or graphs:
            table.add_column("" if counts else "graph", justify="right", no_wrap=True, min_width=3)
        for name, width, folds in _COLUMNS:
            justify: JustifyMethod = "left" if name in ("GEMM", "casts a @ b") else "right"
            table.add_column(name, justify=justify, min_width=width, no_wrap=not folds, overflow="fold")
        table.add_column("what and why", no_wrap=True, overflow="ellipsis", max_width=30)
        numbers = {reason: number for number, reason in enumerate(self.reasons(), 1)}
        for row, count in lines:
            extra = [str(row.graph)] if graphs else [f"x{count}" if count > 1 else ""] if counts else []
            cells = [row.name, *extra, row.role, *_cells(row), f"[{numbers[row.reason]}] {row.why}"]
            # Text, not markup: layer names and reasons may hold square brackets.
            table.add_row(*(Text(cell) for cell in cells), style=_STYLES[row.status])
        return table

    def legend(self) -> list[str]:
        """Each full reason with its number in the table and its count."""
        return [f"[{number}] {count} x {reason}" for number, (reason, count) in enumerate(self.reasons().items(), 1)]

    def totals(self) -> list[str]:
        """Counts, predicted time, how to read a cast, and saved bytes, one line each."""
        count = Counter(row.status for row in self.rows)
        lines = [f"{count['converted']} converted, {count['kept']} kept, {count['declined']} declined"]
        before, after = sum(row.time_high for row in self.rows), sum(row.time_low for row in self.rows)
        line = f"predicted time of all GEMMs with their casts on {self.target}: {time_text(before)} > {time_text(after)} us"
        if decoded := sum(row.decoded for row in self.rows):
            line += f" ({decoded} decoded: the formats are emulated there, which is slower by nature)"
        lines.append(line)
        if self.converted:
            note = "element:block[:scale][:rule][:rounding], to nearest even where nothing is said; * rotation"
            lines.append(f"casts: {note}")
        if (turns := self.rotations()) is not None:
            line = f"rotations: {turns.asked} asked for; {turns.riding} ride inside a quantisation, {turns.own} on their own"
            lines += [line, *(f"  moved: {moved}" for moved in turns.moved)]
        saved = self.saved()
        if saved.codes or saved.other:
            high = f" (those operands in high precision: {bytes_text(saved.high)}, weights being alive anyway)"
            compared = high if saved.codes else ""
            line = f"saved for backward: {bytes_text(saved.codes)} of codes and scales{compared}"
            lines.append(f"{line}, {bytes_text(saved.other)} of everything else")
        if self.launches:
            lines.append(kernel_table.total(self.launches, self.target))
            graphs = any(trace.plan.options.inductor.get("triton.cudagraphs") for trace in self.traces)
            lines += filter(None, [None if graphs else kernel_table.host_bound(self.launches, self.target)])
        return lines

    def print(self, console: Console | None = None, *, compact: bool = True, kernels: bool = False) -> None:
        """Prints the table, what the reasons are, the totals and the notes.

        Without a console of the caller's: at the terminal's width, or where there is none at no less than 140 columns.
        compact: see `lines`. kernels: the table of kernels as well.
        """
        if console is None:
            console = Console()
            if not console.is_terminal:
                console = Console(width=max(console.width, WIDTH))
        # Too wide a table wraps in a narrow terminal: no column is lost.
        console.print(self.table(compact), crop=False)
        if kernels:
            console.print(kernel_table.table(self.launches, self.target, compact), crop=False)
        for line in (*self.legend(), *self.totals(), *(f"note: {note}" for note in self.notes)):
            style = "yellow" if line.startswith("note:") else None
            console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    def text(self, width: int = 160, *, compact: bool = True, kernels: bool = False) -> str:
        """What `print` prints, as a string without colours."""
        console = Console(width=width, no_color=True, force_terminal=False)
        with console.capture() as captured:
            self.print(console, compact=compact, kernels=kernels)
        return captured.get()

    def to_json(self) -> str:
        """The rows, kernels, reasons, notes and saved bytes as JSON; an SQNR that is no number is the text "inf" or "nan"."""
        rows = []
        for row in self.rows:
            sqnr = {key: value if math.isfinite(value) else str(value) for key, value in row.sqnr.items()}
            rows.append({**asdict(row), "sqnr": sqnr})
        content: dict[str, Any] = {
            "recipe": self.recipe,
            "target": self.target,
            "rows": rows,
            "kernels": [{**asdict(each), "ran_with": RAN_WITH.get((each.kernel, each.sizes))} for each in self.launches],
            "reasons": dict(self.reasons()),
            "saved": asdict(self.saved()),
            "notes": self.notes,
            "rotations": asdict(turns) if (turns := self.rotations()) is not None else None,
        }
        return json.dumps(content, indent=1, allow_nan=False)


def _row(index: int, decision: Decision, trace: Trace, high: dict[str, int]) -> Row:
    gemm = decision.gemm if decision.converted else None
    quants = {name: quant for name, quant in (("a", gemm.a), ("b", gemm.b)) if quant is not None} if gemm else {}
    times = predict(decision, trace.plan.target)
    site, ordinal = decision.key, decision.key.partition("#")[2]
    role = str(decision.role or "backward")
    # The codes of a site are saved for its own backward GEMMs; count them once, at its fprop.
    items = [i for i in trace.saved if role == Role.FPROP and i["info"] and i["info"]["site"] == site]
    return Row(
        graph=index,
        name=f"{decision.fqn}#{ordinal}" if ordinal else decision.fqn,
        role=role,
        m=size_text(decision.m),
        n=size_text(decision.n),
        k=size_text(decision.k),
        a=str(gemm.a or "hp") if gemm else "",
        b=str(gemm.b or "hp") if gemm else "",
        converted=decision.converted,
        reason=decision.reason,
        time_high=times.high,
        time_low=times.low if decision.converted else times.high,
        saved=sum(i["bytes"] for i in items),
        sqnr={name: trace.sqnr[cast] for name, cast in sorted(decision.casts.items()) if cast in trace.sqnr},
        batch=size_text(decision.batch),
        saved_high=high.get(site, 0) if role == Role.FPROP else 0,
        block={name: str(quant.block) for name, quant in quants.items()},
        rounding={name: str(quant.rounding) for name, quant in quants.items()},
        rotation=" * ".join(f"{axis}:{r}" for axis, r in gemm.rotations.items()) if gemm else "",
    )


def _saved_high(trace: Trace) -> dict[str, int]:
    """Bytes by site that the operands whose codes are saved would take in high precision, each operand once."""
    sites = [d.site for d in trace.plan.decisions if d.site is not None]
    operands = {operand.node.name: operand.node for site in sites for operand in (site.x, site.w)}
    # A parameter is alive in any case.
    free = {site.w.node.name for site in sites if site.weight is not None}
    found: Counter[str] = Counter()
    for info in (item["info"] for item in trace.saved):
        if info and info["base"] in operands and info["base"] not in free:
            free.add(info["base"])
            value = operands[info["base"]].meta["val"]
            found[info["site"]] += size_hint(value.numel()) * value.element_size()
    return dict(found)


def _merge(rows: list[Row]) -> Row:
    """One row for several: `*` for the numbers of the name that differ, sums, the smallest SQNR (NaN before all)."""
    if len(rows) == 1:
        return rows[0]
    between, numbers = NUMBER.split(rows[0].name), zip(*(NUMBER.findall(row.name) for row in rows), strict=True)
    labels = [found[0] if len(set(found)) == 1 else "*" for found in numbers]
    sqnr = {name: _smallest(row.sqnr[name] for row in rows if name in row.sqnr) for row in rows for name in row.sqnr}
    return replace(
        rows[0],
        name=between[0] + "".join(label + rest for label, rest in zip(labels, between[1:], strict=True)),
        time_high=sum(row.time_high for row in rows),
        time_low=sum(row.time_low for row in rows),
        saved=sum(row.saved for row in rows),
        saved_high=sum(row.saved_high for row in rows),
        sqnr=sqnr,
    )


def _smallest(values: Iterable[float]) -> float:
    return min(values, key=lambda value: -math.inf if math.isnan(value) else value)


def _cells(row: Row) -> list[str]:
    """Sizes, casts, times, saved bytes and SQNR as the table shows them."""
    size = f"{row.m} x {row.n} x {row.k}"
    size = size if "=" in size else size.replace(" ", "")
    casts = row.a if row.a == row.b else f"{row.a} @ {row.b}"
    casts += f" * {row.rotation}" if row.rotation else ""
    times = f"{time_text(row.time_high)} > {time_text(row.time_low)}" if row.converted else time_text(row.time_high)
    sqnr = "/".join(_decibel(row.sqnr.get(name)) for name in ("a", "b")) if row.sqnr else ""
    sizes = size if row.batch == "1" else f"{row.batch} * ({size})"
    return [sizes, casts, times, bytes_text(row.saved) if row.saved else "", sqnr]


def _decibel(value: float | None) -> str:
    if value is None:
        return "-"
    return "exact" if value == math.inf else f"{value:.1f}"
