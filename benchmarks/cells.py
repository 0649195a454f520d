"""A cell seen by the client, over the same cell asked of the same guest ipykernel from inside the guest."""

import statistics
from collections.abc import Iterator

from benchmarks.harness import Figure, Plan, ratio_of
from benchmarks.inside import Inside
from benchmarks.kernels import OURS, Kernels, printing

CELL = "x = 1"
BLOCK = 15


def measure(plan: Plan, kernels: Kernels) -> Iterator[tuple[str, Figure]]:
    """Yield cell_ratio and stdout_ratio."""
    with kernels.started(OURS) as guest:
        inside = Inside(guest)
        inside.cells(CELL, BLOCK)
        through, direct = [], []
        for _ in plan.turns(12, 45):
            through.append(statistics.median(guest.cells(CELL, BLOCK)))
            direct.append(statistics.median(inside.cells(CELL, BLOCK)))
        yield "cell_ratio", ratio_of(through, direct, "ms", 1000)

        code, size = printing(0.5)
        guest.printed(code, size)
        inside.printed(code, size)
        through, direct = [], []
        for _ in plan.turns(10, 45):
            through.append(guest.printed(code, size))
            direct.append(inside.printed(code, size))
        yield "stdout_ratio", ratio_of(through, direct, "MB/s")
