"""Figures and how they are kept honest: turns, medians, spread, the machine named, comparison with a baseline.

A ratio is taken against a yardstick measured in the same run, turn by turn, so that whatever else the machine does hits both.
`baseline.json` keeps what means something on another machine too: ratios and the like, never times. Knows nothing of what is measured.
"""

import json
import os
import platform
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.goals import GOALS, Goal

FIRST_ALLOWANCE = 0.05
"""A change this small is never called worse."""
QUIET_SHARE = 0.25
"""The machine counts as quiet while others use less of it."""

CLEAN_UP_S = 30.0
"""What was stopped has so long to end what it started."""


@dataclass
class Figure:
    """One measured figure.

    Attributes:
        value: the figure: a median, or a ratio of two medians.
        unit: of the value.
        runs: every single result, in the order in which they were taken.
        detail: what it is made of, for people.
    """

    value: float
    unit: str
    runs: list[float] = field(default_factory=list)
    detail: str = ""

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of the runs, as a share of the value; 0 where the value is 0."""
        if len(self.runs) < 2 or not self.value:
            return 0.0
        low, _, high = statistics.quantiles(self.runs, n=4, method="inclusive")
        return (high - low) / 2 / abs(self.value)


@dataclass
class Table:
    """A figure that depends on something: one row a case."""

    title: str
    columns: list[str]
    rows: list[list[float]]


@dataclass
class Results:
    """What a run found.

    Attributes:
        figures: by key.
        failures: why a figure could not be taken, by key.
        tables: by key.
        machine: what they were taken on.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


def median_of(runs: Sequence[float], unit: str, detail: str = "") -> Figure:
    """Return the median of some runs as a figure."""
    return Figure(statistics.median(runs), unit, list(runs), detail)


def ratio_of(ours: Sequence[float], yardstick: Sequence[float], unit: str, scale: float = 1.0) -> Figure:
    """Return the median of ours over the yardstick's.

    Args:
        ours: what was measured, by turns.
        yardstick: what it is compared with, measured in the same turns.
        unit: of both, for people.
        scale: from what was measured to that unit.
    """
    mine, theirs = statistics.median(ours), statistics.median(yardstick)
    runs = [a / b for a, b in zip(ours, yardstick, strict=True)]
    return Figure(mine / theirs, "ratio", runs, f"{mine * scale:.3g} {unit} against {theirs * scale:.3g} {unit}")


class Plan:
    """How much is measured, and within what time.

    Args:
        quick: few turns, to try things out.
    """

    def __init__(self, *, quick: bool = False) -> None:
        self.quick = quick

    def turns(self, wanted: int, budget_s: float, *, least: int = 3) -> Iterator[int]:
        """Yield the numbers of the turns to take: as many as wanted, fewer where they take longer than their budget.

        Args:
            wanted: how many turns are good to have.
            budget_s: no turn begins after so many seconds, once there are `least`.
            least: so many are taken anyway.
        """
        if self.quick:
            wanted, budget_s = max(least, wanted // 4), budget_s / 3
        began = time.monotonic()
        for number in range(wanted):
            if number >= least and time.monotonic() - began > budget_s:
                return
            yield number


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer, again and again where that is caught. Main thread only."""

    def on_alarm(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), CLEAN_UP_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Wait for something that another process does and nobody announces.

    Raises:
        TimeoutError: it does not happen.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout_s:g} s")
        time.sleep(0.05)


def wait_quiet(timeout_s: float = 5.0) -> bool:
    """Wait until this machine has little to do; False when it always has."""
    deadline = time.monotonic() + timeout_s
    while True:
        before, began = _busy_s(), time.monotonic()
        time.sleep(0.2)
        share = (_busy_s() - before) / (time.monotonic() - began) / (os.cpu_count() or 1)
        if share < QUIET_SHARE:
            return True
        if time.monotonic() > deadline:
            return False


def _busy_s() -> float:
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, Any]:
    """Name the hardware and software that figures are taken on."""
    from agentvm_kernel.hypervisor import accelerator

    chosen = accelerator.choose()
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": _first_line("qemu-system-x86_64", "--version"),
        "libvirt": _first_line("libvirtd", "--version"),
        "accelerator": chosen.kind,
        "accelerator_reason": chosen.reason,
        "load_at_start": load(),
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def load() -> float:
    """Return how many processes wanted a CPU during the last minute: more than ours, and the figures are disturbed."""
    return round(os.getloadavg()[0], 2)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "not found"


# ---- files


def to_json(results: Results) -> str:
    """Return results as JSON."""
    data = asdict(results)
    for key, figure in results.figures.items():
        data["figures"][key]["spread"] = round(figure.spread, 4)
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def from_json(text: str) -> Results:
    """Return what `to_json` wrote."""
    data = json.loads(text)
    for figure in data["figures"].values():
        figure.pop("spread", None)
    return Results(
        figures={key: Figure(**value) for key, value in data["figures"].items()},
        failures=data.get("failures", {}),
        tables={key: Table(**value) for key, value in data.get("tables", {}).items()},
        machine=data.get("machine", {}),
    )


@dataclass(frozen=True)
class Baseline:
    """An earlier figure to compare with: its value, and its spread as a share of it."""

    value: float
    spread: float


def to_baseline(results: Results, goals: Mapping[str, Goal] = GOALS) -> str:
    """Return, as JSON, what of these results later ones are compared with."""
    kept = {
        key: asdict(Baseline(round(figure.value, 4), round(figure.spread, 4)))
        for key, figure in results.figures.items()
        if key in goals and goals[key].portable
    }
    return json.dumps({"figures": kept, "machine": results.machine}, indent=1, ensure_ascii=False) + "\n"


def read_baseline(path: Path) -> dict[str, Baseline]:
    """Return the baseline by key; empty where there is none."""
    if not path.exists():
        return {}
    return {key: Baseline(**value) for key, value in json.loads(path.read_text())["figures"].items()}


def worse(results: Results, before: Mapping[str, Baseline], goals: Mapping[str, Goal] = GOALS) -> list[str]:
    """Name the figures that got worse than the baseline by more than the spread of both, or that it has and this run has not."""
    lines = []
    for key, old in before.items():
        if key in results.failures:
            lines.append(f"{key}: could not be taken ({results.failures[key]}), was {old.value:.3g}")
        figure, goal = results.figures.get(key), goals.get(key)
        if figure is None or goal is None:
            continue
        allowed = max(FIRST_ALLOWANCE, figure.spread + old.spread)
        change = (figure.value - old.value) / old.value if old.value else figure.value
        if (-change if goal.at_least else change) > allowed and not _within_goal_of_zero(figure, old, goal):
            lines.append(f"{key}: {figure.value:.3g} was {old.value:.3g} ({change:+.0%}, allowed {allowed:.0%})")
    return lines


def _within_goal_of_zero(figure: Figure, old: Baseline, goal: Goal) -> bool:
    """Whether both are percentages near zero, whose changes say nothing while the goal is met."""
    return figure.unit == "%" and goal.met(figure.value) and goal.met(old.value)
