"""Takes figures and keeps them honest: alternating runs, medians, spread, the machine named; table, JSON, HTML page, comparison.

A figure is one number with a goal. Ratios are taken against a yardstick measured in the same run, turn by turn, so that whatever else
the machine does hits both. `benchmarks/baseline.json` keeps ratios to compare with, never absolute times.
"""

import html
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LATEST = HERE / "latest.json"
BASELINE = HERE / "baseline.json"
REPORT = HERE / "report.html"


@dataclass(frozen=True)
class Goal:
    """What a figure should reach: at most or at least a limit."""

    limit: float
    at_most: bool = True

    def reached(self, value: float) -> bool:
        """Whether `value` is good enough."""
        return value <= self.limit if self.at_most else value >= self.limit

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:g}"


@dataclass
class Figure:
    """One measured figure.

    Attributes:
        value: the median of `runs`, or what was computed from two medians.
        unit: of the value.
        runs: every single result, in the order in which they were taken.
        detail: what the value was made of, for people.
    """

    value: float
    unit: str
    runs: list[float] = field(default_factory=list)
    detail: str = ""

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of the runs, as a share of their median."""
        if len(self.runs) < 4:
            low, high = min(self.runs, default=0.0), max(self.runs, default=0.0)
        else:
            low, _, high = statistics.quantiles(self.runs, n=4)
        middle = statistics.median(self.runs) if self.runs else 0.0
        return (high - low) / 2 / middle if middle else 0.0


def timed(action: Callable[[], object]) -> float:
    """Return how many seconds `action` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def ratio(ours: Callable[[], float], yardstick: Callable[[], float], *, runs: int, warm_up: int = 1) -> Figure:
    """Measure two things by turns and return ours over the yardstick's.

    Args:
        ours: does the thing once and returns its measure.
        yardstick: the same for what it is compared with.
        runs: how many counted turns.
        warm_up: turns before that, not counted.
    """
    pairs = [(ours(), yardstick()) for _ in range(warm_up + runs)][warm_up:]
    mine = statistics.median(pair[0] for pair in pairs)
    theirs = statistics.median(pair[1] for pair in pairs)
    return Figure(mine / theirs, "ratio", [a / b for a, b in pairs], f"{mine:.4g} against {theirs:.4g}")


def single(measure: Callable[[], float], unit: str, *, runs: int, warm_up: int = 1, detail: str = "") -> Figure:
    """Measure one thing and return the median."""
    values = [measure() for _ in range(warm_up + runs)][warm_up:]
    return Figure(statistics.median(values), unit, values, detail)


def machine() -> dict[str, Any]:
    """Name the hardware and software that figures were taken on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=False).stdout
    from agentvm_kernel.hypervisor import accelerator

    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": qemu.splitlines()[0] if qemu else "not found",
        "accelerator": accelerator.choose().kind,
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def save(figures: Mapping[str, Figure], path: Path = LATEST) -> None:
    """Write figures as JSON."""
    data = {
        "figures": {key: {**asdict(figure), "spread": figure.spread} for key, figure in figures.items()},
        "machine": machine(),
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


def load(path: Path) -> dict[str, Figure]:
    """Read what `save` wrote."""
    found = {}
    for key, data in json.loads(path.read_text())["figures"].items():
        found[key] = Figure(data["value"], data["unit"], data["runs"], data.get("detail", ""))
    return found


def worse(figures: Mapping[str, Figure], before: Mapping[str, Figure], goals: Mapping[str, Goal]) -> list[str]:
    """Name the ratios that got worse than the baseline by more than the spread of both.

    Only ratios and percentages are compared: times of different machines say nothing about each other.
    """
    lines = []
    for key, figure in figures.items():
        old = before.get(key)
        if old is None or figure.unit not in ("ratio", "%") or key not in goals:
            continue
        allowed = max(0.05, figure.spread + old.spread)
        change = (figure.value - old.value) / old.value if old.value else figure.value
        if (change if goals[key].at_most else -change) > allowed:
            lines.append(f"{key}: {figure.value:.3g} was {old.value:.3g} ({change:+.0%}, allowed {allowed:.0%})")
    return lines


def print_table(figures: Mapping[str, Figure], goals: Mapping[str, Goal]) -> None:
    """Print what was measured, with what falls short called so."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", "unit", "spread", "goal", "", "made of")
    for key, figure in figures.items():
        goal = goals.get(key)
        verdict = "" if goal is None else "reached" if goal.reached(figure.value) else "[bold red]falls short[/]"
        table.add_row(
            key, f"{figure.value:.3g}", figure.unit, f"±{figure.spread:.0%}", str(goal or ""), verdict, figure.detail
        )
    Console(width=150).print(table)


def write_report(
    figures: Mapping[str, Figure], goals: Mapping[str, Goal], before: Mapping[str, Figure], path: Path = REPORT
) -> None:
    """Write a page with a chart for every figure: each run a dot, the median, the goal and the baseline as lines."""
    rows = [_chart(key, figure, goals.get(key), before.get(key)) for key, figure in figures.items()]
    facts = "".join(f"<li>{html.escape(name)}: {html.escape(str(value))}</li>" for name, value in machine().items())
    path.write_text(
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>agentvm benchmarks</title>"
        "<style>body{font:15px sans-serif;max-width:60em;margin:2em auto}svg{width:100%;height:70px}"
        ".short{color:#b00020}.ok{color:#1b7f3b}small{color:#666}</style>"
        f"<h1>agentvm benchmarks</h1><ul>{facts}</ul><p>Dots: single runs. Black: median. Green: goal. Grey: baseline.</p>{''.join(rows)}"
    )


def _chart(key: str, figure: Figure, goal: Goal | None, before: Figure | None) -> str:
    marks: Sequence[float] = [
        *figure.runs,
        figure.value,
        *([goal.limit] if goal else []),
        *([before.value] if before else []),
    ]
    top = max([*marks, 1e-9]) * 1.1

    def x(value: float) -> str:
        return f"{10 + 780 * max(0.0, value) / top:.1f}"

    lines = [f"<line x1='{x(figure.value)}' x2='{x(figure.value)}' y1='5' y2='45' stroke='black' stroke-width='3'/>"]
    if goal:
        lines.append(
            f"<line x1='{x(goal.limit)}' x2='{x(goal.limit)}' y1='5' y2='45' stroke='#1b7f3b' stroke-dasharray='4'/>"
        )
    if before:
        lines.append(f"<line x1='{x(before.value)}' x2='{x(before.value)}' y1='5' y2='45' stroke='#999'/>")
    dots = "".join(f"<circle cx='{x(run)}' cy='25' r='4' fill='#3366cc' fill-opacity='.5'/>" for run in figure.runs)
    verdict = (
        ""
        if goal is None
        else "<b class='ok'>reached</b>"
        if goal.reached(figure.value)
        else "<b class='short'>falls short</b>"
    )
    title = f"{html.escape(key)}: {figure.value:.3g} {html.escape(figure.unit)}"
    return (
        f"<h3>{title} <small>±{figure.spread:.0%}, goal {goal or 'none'}</small> {verdict}</h3>"
        "<svg viewBox='0 0 800 60'><line x1='10' x2='790' y1='45' y2='45' stroke='#ccc'/>"
        f"{dots}{''.join(lines)}<text x='790' y='58' text-anchor='end' font-size='11'>{top:.3g}</text>"
        f"<text x='10' y='58' font-size='11'>0</text></svg><small>{html.escape(figure.detail)}</small>"
    )
