"""What idle clones cost: memory and CPU time of their QEMU processes."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

from agentvm_kernel.sandbox.sandbox import Sandbox
from benchmarks.harness import Figure, Plan, median_of

CLONES = 4
SETTLE_S = 5.0
IDLE_S = 15.0
PANDAS = "'pandas' in __import__('sys').modules"


def measure(plan: Plan, kernels: object) -> Iterator[tuple[str, Figure]]:
    """Yield clone_pss_mib, idle_cpu_percent and paused_cpu_percent."""
    yield from asyncio.run(_measure(plan)).items()


async def _measure(plan: Plan) -> dict[str, Figure]:
    watch_s = 5.0 if plan.quick else IDLE_S
    async with _clones(CLONES) as clones:
        processes = [clone.lease.machine.qemu_pid for clone in clones]
        # Threads and timers of the guest's start come to rest.
        await asyncio.sleep(SETTLE_S)
        memory = [_pss_mib(pid) for pid in processes]
        running = await _cpu_percent(processes, watch_s)
        for clone in clones:
            await clone.lease.pause()
        paused = await _cpu_percent(processes, watch_s)
        for clone in clones:
            await clone.lease.resume()
            # Asked at the end: answering writes to memory.
            if (await clone.run(PANDAS)).require_ok().value != "True":
                raise RuntimeError("pandas is not loaded in the clone")
    about = f"each of {CLONES} clones of one template, all that QEMU has mapped (smaps_rollup)"
    return {
        "clone_pss_mib": median_of(memory, "MiB", about),
        "idle_cpu_percent": median_of(running, "%", f"of one CPU, each QEMU process over {watch_s:g} s"),
        "paused_cpu_percent": median_of(paused, "%", f"of one CPU, each QEMU process over {watch_s:g} s"),
    }


@asynccontextmanager
async def _clones(count: int) -> AsyncIterator[list[Sandbox]]:
    clones: list[Sandbox] = []
    try:
        for _ in range(count):
            clones.append(await Sandbox.create())
        yield clones
    finally:
        for clone in clones:
            await clone.close()


def _pss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/{pid}/smaps_rollup has no Pss")


async def _cpu_percent(processes: list[int], seconds: float) -> list[float]:
    before = [_cpu_s(pid) for pid in processes]
    await asyncio.sleep(seconds)
    return [100 * (_cpu_s(pid) - used) / seconds for pid, used in zip(processes, before, strict=True)]


def _cpu_s(pid: int) -> float:
    # proc(5): after the command's name in parentheses, utime and stime are the 12th and 13th.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
