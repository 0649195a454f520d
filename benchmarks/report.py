"""Shows results: a table as text, and a page with charts that needs nothing beside itself."""

import html
from collections.abc import Mapping, Sequence

from benchmarks.goals import GOALS, Goal
from benchmarks.harness import Baseline, Figure, Results, Table

WIDTH, HEIGHT = 800, 60
STYLE = """
body { font: 15px/1.4 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
svg { width: 100% } table { border-collapse: collapse; width: 100% }
td, th { padding: .3em .6em; text-align: left; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums } .met { color: #1b7f3b } .short { color: #b00020; font-weight: bold }
small { color: #666 } h3 { margin-bottom: 0 }
"""


def verdict(figure: Figure, goal: Goal) -> str:
    """Say whether a figure is good enough."""
    if goal.limit is None:
        return ""
    return "met" if goal.met(figure.value) else "short of goal"


def as_text(results: Results, goals: Mapping[str, Goal] = GOALS) -> str:
    """Return the results as a table for a terminal."""
    rows = [("figure", "goal", "measured", "spread", "", "made of")]
    for key, goal in goals.items():
        if key in results.figures:
            figure = results.figures[key]
            measured = f"{_number(figure.value)} {figure.unit}"
            rows.append((key, str(goal), measured, f"±{figure.spread:.0%}", verdict(figure, goal), figure.detail))
        elif key in results.failures:
            rows.append((key, str(goal), "", "", "NOT MEASURED", results.failures[key]))
    rows += [(key, "", "", "", "NOT MEASURED", why) for key, why in results.failures.items() if key not in goals]
    parts = [_columns(rows)]
    for table in results.tables.values():
        lines = [tuple(table.columns), *(tuple(map(_number, row)) for row in table.rows)]
        parts.append(f"{table.title}\n{_columns(lines)}")
    facts = results.machine
    if facts:
        parts.append(
            f"Taken on {facts.get('cpu')}, {facts.get('cores')} cores, {facts.get('memory_gib')} GiB;"
            f" {facts.get('qemu')}, {facts.get('libvirt')}\nGuests run under {str(facts.get('accelerator')).upper()}:"
            f" {facts.get('accelerator_reason')}\nLoad at the start: {facts.get('load_at_start')}, at the end: {facts.get('load_at_end')}"
        )
    return "\n\n".join(parts) + "\n"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def as_html(
    results: Results, before: Mapping[str, Baseline], worse: Sequence[str] = (), goals: Mapping[str, Goal] = GOALS
) -> str:
    """Return the results as a page: what they were taken on, a table, and a chart of each figure's single runs.

    Args:
        results: what was measured.
        before: the baseline, shown beside.
        worse: what got worse than that.
        goals: of the figures.
    """
    facts = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in results.machine.items()
    )
    rows = "".join(_row(key, goal, results, before.get(key)) for key, goal in goals.items())
    charts = "".join(
        _chart(key, goals[key], results.figures[key], before.get(key)) for key in goals if key in results.figures
    )
    tables = "".join(map(_table, results.tables.values()))
    changes = "".join(f"<li class='short'>{html.escape(line)}</li>" for line in worse)
    return (
        "<!doctype html>\n<html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>agentvm: benchmarks</title><style>{STYLE}</style><h1>agentvm: benchmarks</h1>"
        f"<table>{facts}</table><h2>Goals</h2>"
        + (f"<p>Worse than the baseline:</p><ul>{changes}</ul>" if changes else "")
        + f"<table><tr><th>figure<th>goal<th>measured<th>spread<th>baseline<th></tr>{rows}</table>"
        "<h2>Runs</h2><p><small>Blue: single runs. Black: the figure. Green, dashed: its goal. Grey: the baseline.</small></p>"
        f"{charts}{tables}</html>\n"
    )


def _row(key: str, goal: Goal, results: Results, before: Baseline | None) -> str:
    about = f"<td>{key}<br><small>{html.escape(goal.about)}</small><td class='number'>{goal}"
    if key in results.figures:
        figure = results.figures[key]
        said = verdict(figure, goal)
        kind = "short" if said == "short of goal" else "met"
        old = _number(before.value) if before else ""
        return (
            f"<tr>{about}<td class='number'>{_number(figure.value)} {html.escape(figure.unit)}"
            f"<td class='number'>±{figure.spread:.0%}<td class='number'>{old}<td class='{kind}'>{said}</tr>"
        )
    if key in results.failures:
        return f"<tr>{about}<td colspan='3'>{html.escape(results.failures[key])}<td class='short'>not measured</tr>"
    return ""


def _chart(key: str, goal: Goal, figure: Figure, before: Baseline | None) -> str:
    shown = [*figure.runs, figure.value]
    shown += [goal.limit] if goal.limit is not None else []
    shown += [before.value] if before else []
    top = max([*shown, 1e-9]) * 1.1

    def at(value: float) -> str:
        return f"{10 + (WIDTH - 20) * max(0.0, value) / top:.1f}"

    def line(value: float, look: str) -> str:
        return f"<line x1='{at(value)}' x2='{at(value)}' y1='4' y2='44' {look}/>"

    marks = "".join(
        f"<circle cx='{at(run)}' cy='24' r='4' fill='#36c' fill-opacity='.45'><title>{_number(run)}</title></circle>"
        for run in figure.runs
    )
    marks += line(figure.value, "stroke='black' stroke-width='3'")
    if goal.limit is not None:
        marks += line(goal.limit, "stroke='#1b7f3b' stroke-width='2' stroke-dasharray='5 3'")
    if before:
        marks += line(before.value, "stroke='#999' stroke-width='2'")
    return (
        f"<h3>{key}: {_number(figure.value)} {html.escape(figure.unit)}</h3>"
        f"<small>{html.escape(goal.about)}{': ' if figure.detail else ''}{html.escape(figure.detail)}</small>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{key}'>"
        f"<line x1='10' x2='{WIDTH - 10}' y1='44' y2='44' stroke='#ccc'/>{marks}"
        f"<text x='10' y='57' font-size='11'>0</text>"
        f"<text x='{WIDTH - 10}' y='57' text-anchor='end' font-size='11'>{_number(top)}</text></svg>"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}" for column in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{_number(value)}" for value in row) + "</tr>" for row in table.rows)
    return f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{rows}</table>"
