"""The whole path with the runtime as a local process, against a bare ipykernel: what it costs where no emulation flatters it."""

from collections.abc import Iterator

from benchmarks.harness import Figure, Plan, ratio_of
from benchmarks.kernels import BARE, LOCAL, Kernels, printing

CELL = "x = 1"
BLOCK = 10
BULK = 10


def measure(plan: Plan, kernels: Kernels) -> Iterator[tuple[str, Figure]]:
    """Yield proxy_ratio, proxy_stdout_ratio and proxy_bulk_ratio."""
    with kernels.started(BARE, warm_up=100) as bare, kernels.started(LOCAL, warm_up=100) as ours:
        # Short turns: what else the machine does comes and goes within a second.
        through, direct = [], []
        for _ in plan.turns(60, 20, least=10):
            through.append(_middle(ours.cells(CELL, BLOCK)))
            direct.append(_middle(bare.cells(CELL, BLOCK)))
        yield "proxy_ratio", ratio_of(through, direct, "ms", 1000)

        code, size = printing(2)
        ours.printed(code, size)
        bare.printed(code, size)
        through, direct = [], []
        for _ in plan.turns(24, 25, least=5):
            through.append(ours.printed(code, size))
            direct.append(bare.printed(code, size))
        yield "proxy_stdout_ratio", ratio_of(through, direct, "MB/s")

        code, size = f"for _ in range({BULK}): print('x' * 999_999)", BULK * 1_000_000
        through, direct = [], []
        for _ in plan.turns(16, 10, least=4):
            through.append(ours.printed(code, size))
            direct.append(bare.printed(code, size))
        yield "proxy_bulk_ratio", ratio_of(through, direct, "MB/s")


def _middle(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]
