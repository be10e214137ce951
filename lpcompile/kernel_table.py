"""The kernels of forward and backward as a table: what each computes and moves, for whom, and which rules made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from rich import box
from rich.table import Table
from rich.text import Text

from lpcompile.launches import RAN_WITH
from lpcompile.pipeline import Launch
from lpcompile.texts import NUMBER, bytes_text, time_text

# Microseconds that a host may take for one operator of ours, autograd around it included: 90 to 160 were measured.
HOST = 100.0


def lines(launches: Sequence[Launch], compact: bool = True) -> list[tuple[Launch, int]]:
    """The launches with the number behind each.

    compact: those that differ only in numbers inside the layers' names become one, with `*` for the numbers and the sums of
    bytes and times.
    """
    if not compact:
        return [(launch, 1) for launch in launches]
    groups: dict[Launch, list[Launch]] = {}
    for launch in launches:
        sites = tuple(NUMBER.sub("*", site) for site in launch.sites)
        key = replace(launch, moved=0.0, least=0.0, time=0.0, sites=sites, reads=())
        groups.setdefault(key, []).append(launch)
    return [
        (
            replace(
                members[0] if len(members) == 1 else key,
                moved=sum(each.moved for each in members),
                least=sum(each.least for each in members),
                time=sum(each.time for each in members),
            ),
            len(members),
        )
        for key, members in groups.items()
    ]


def table(launches: Sequence[Launch], target: str, compact: bool = True) -> Table:
    """One line a kernel; equal ones of several layers in one line with their number.

    Of kernels that have run on a GPU in this process: with which schedule, or that torch's own product was faster.
    """
    found = Table(title=Text(f"kernels on {target}"), box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    shown = lines(launches, compact)
    ran_with = [RAN_WITH.get((launch.kernel, launch.sizes), "") for launch, _ in shown]
    counted = any(count > 1 for _, count in shown)
    found.add_column("phase", no_wrap=True)
    if counted:
        found.add_column("", justify="right", no_wrap=True)
    for name, narrow, right in (
        ("family", True, False),
        ("kernel", False, False),
        ("sizes", True, True),
        ("moved (x least)", True, True),
        ("us", True, True),
        ("rules", False, False),
        ("for", False, False),
        *([("ran with", False, False)] if any(ran_with) else []),
    ):
        found.add_column(name, no_wrap=narrow, justify="right" if right else "left", overflow="fold", min_width=len(name))
    for (launch, count), schedule in zip(shown, ran_with, strict=True):
        times = f"{bytes_text(launch.moved)} ({launch.moved / launch.least:.2f})" if launch.least else ""
        cells = [launch.phase, *([f"x{count}" if count > 1 else ""] if counted else []), launch.family]
        # The family stands in a column of its own.
        cells += [launch.kernel.removeprefix(f"{launch.family} "), "x".join(launch.sizes), times, time_text(launch.time)]
        cells += [" ".join(launch.rules), ", ".join(launch.sites), *([schedule] if any(ran_with) else [])]
        # Text, not markup: kernels and layer names may hold square brackets.
        found.add_row(*(Text(cell) for cell in cells))
    return found


def total(launches: Sequence[Launch], target: str) -> str:
    """How many of each family, and what they move and take together."""
    families = Counter(launch.family for launch in launches)
    moved, least = sum(each.moved for each in launches), sum(each.least for each in launches)
    phases = Counter(launch.phase for launch in launches)
    return (
        f"kernels on {target}: {len(launches)} ({', '.join(f'{count} {phase}' for phase, count in phases.items())}: "
        f"{', '.join(f'{count} {family}' for family, count in families.most_common())}), {bytes_text(moved)} moved "
        f"({moved / max(least, 1.0):.2f} times the least), {time_text(sum(each.time for each in launches))} us"
    )


def host_bound(launches: Sequence[Launch], target: str) -> str | None:
    """What to do where the device would wait for the host on average; None elsewhere."""
    mean = sum(each.time for each in launches) / max(len(launches), 1)
    if not launches or target == "cpu" or mean >= HOST:
        return None
    return (
        f"short kernels, {time_text(mean)} us on average: a host may take {HOST:.0f} us to launch one. "
        'CUDA graphs launch all at once: options={"inductor": {"triton.cudagraphs": True}}'
    )
