"""How long until the first cell's reply: from the pool, from the template, and from a bare ipykernel. And a pooled machine by itself."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from agentvm_kernel.sandbox import keeper, pool
from agentvm_kernel.sandbox.lease import acquire
from agentvm_kernel.sandbox.settings import load_settings
from benchmarks.harness import Figure, Plan, median_of, ratio_of, wait_quiet, wait_until
from benchmarks.kernels import BARE, OURS, Kernels

SIZE = 2
FILL_S = 120.0
GONE_S = 60.0


def measure(plan: Plan, kernels: Kernels) -> Iterator[tuple[str, Figure]]:
    """Yield start_clone_ratio, start_pool_ratio and pool_acquire_ms."""
    # The first start may build the template; page cache and .pyc files are warm afterwards.
    kernels.start_time(OURS)
    kernels.start_time(BARE)

    ours, bare = [], []
    for _ in plan.turns(10, 60):
        wait_until(lambda: pool.count_machines() == 0, "the end of the last machine", GONE_S)
        wait_quiet()
        ours.append(kernels.start_time(OURS))
        wait_quiet()
        bare.append(kernels.start_time(BARE))
    yield "start_clone_ratio", ratio_of(ours, bare, "s")

    with filled_pool():
        ours, bare = [], []
        for _ in plan.turns(12, 90):
            wait_full()
            ours.append(kernels.start_time(OURS))
            wait_full()
            bare.append(kernels.start_time(BARE))
        yield "start_pool_ratio", ratio_of(ours, bare, "s")

        times = []
        for _ in plan.turns(10, 50):
            wait_full()
            times.append(asyncio.run(_acquire_s()) * 1000)
        yield "pool_acquire_ms", median_of(times, "ms", "acquire() in a process that runs, libvirt connection included")


async def _acquire_s() -> float:
    settings = load_settings()
    ready = len(pool.ready_machines())
    began = time.perf_counter()
    lease = await acquire(settings)
    elapsed = time.perf_counter() - began
    await lease.release()
    if len(pool.ready_machines()) >= ready:
        raise RuntimeError("the machine did not come from the pool")
    return elapsed


@contextmanager
def filled_pool() -> Iterator[None]:
    """A pool of SIZE machines with its keeper, emptied afterwards."""
    pool.configure(minimum=SIZE)
    pool.ensure_keeper()
    try:
        yield
    finally:
        asyncio.run(keeper.drain())
        wait_until(lambda: pool.count_machines() == 0, "the end of the pool's machines", GONE_S)


def wait_full() -> None:
    """Wait until the pool is full again, used machines are gone, and nobody is at work on either."""

    def full() -> bool:
        if error := pool.status().error:
            raise RuntimeError(f"the pool cannot be filled: {error}")
        return len(pool.ready_machines()) == SIZE == pool.count_machines()

    wait_until(full, "filling the pool", FILL_S)
    wait_quiet()
