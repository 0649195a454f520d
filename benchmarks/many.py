"""Many machines at once: `python -m benchmarks.many [--clones 10] [--paused 50]`.

Clones are thawed from the template, as many at once as there are CPUs; each runs a cell. Then more are made, each paused once it
has run one, until `--paused` stand side by side; every one has to answer when it is resumed. Nothing may be left at the end.
"""

import argparse
import asyncio
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from agentvm_kernel import Sandbox
from agentvm_kernel.hypervisor.files import MachineFiles, machines_dir

CELL = "import socket\nsocket.gethostname()"


def qemu(sandbox: Sandbox) -> Path:
    """The folder in /proc of the machine's QEMU."""
    return Path("/proc", str(sandbox.lease.machine.qemu_pid))


def cpu_ticks(sandbox: Sandbox) -> int:
    """CPU time that QEMU has used, in clock ticks (proc(5), fields 14 and 15)."""
    fields = (qemu(sandbox) / "stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def pss_mib(sandbox: Sandbox) -> float:
    """Its proportional share of memory."""
    for line in (qemu(sandbox) / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no Pss in smaps_rollup")


async def make(at_once: asyncio.Semaphore) -> Sandbox:
    """A fresh machine that has run a cell."""
    async with at_once:
        sandbox = await Sandbox.create()
        await check(sandbox)
        return sandbox


async def check(sandbox: Sandbox) -> None:
    """It answers, and it is who it should be."""
    result = await sandbox.run(CELL, timeout_s=60)
    assert sandbox.lease.machine.name in str(result.text), result


async def measure(clones: int, paused: int) -> dict[str, Any]:
    """Return the figures."""
    figures: dict[str, Any] = {"cpus": os.cpu_count()}
    at_once = asyncio.Semaphore(os.cpu_count() or 1)
    await (await make(at_once)).close()  # the template is there now
    began = time.monotonic()
    sandboxes = await asyncio.gather(*(make(at_once) for _ in range(clones)))
    figures[f"{clones}_clones_s"] = round(time.monotonic() - began, 2)
    names = [sandbox.lease.machine.name for sandbox in sandboxes]

    async def more() -> Sandbox:
        sandbox = await make(at_once)
        await sandbox.lease.pause()
        return sandbox

    for sandbox in sandboxes:
        await sandbox.lease.pause()
    while len(sandboxes) < paused:
        batch = await asyncio.gather(*(more() for _ in range(min(10, paused - len(sandboxes)))))
        sandboxes += batch
        names += [sandbox.lease.machine.name for sandbox in batch]
    before = list(map(cpu_ticks, sandboxes))
    await asyncio.sleep(3)
    figures["paused"] = len(sandboxes)
    figures["paused_cpu_ticks"] = sum(map(cpu_ticks, sandboxes)) - sum(before)
    figures["pss_mib"] = round(statistics.median(map(pss_mib, sandboxes)), 1)
    answers = []
    for sandbox in sandboxes:
        began = time.monotonic()
        await sandbox.lease.resume()
        answers.append(time.monotonic() - began)
        await check(sandbox)
        await sandbox.lease.pause()
    figures["resume_ms"] = round(statistics.median(answers) * 1000)
    await asyncio.gather(*(sandbox.close() for sandbox in sandboxes))
    deadline = time.monotonic() + 120
    while any(MachineFiles.of(name).folder.exists() for name in names) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    figures["left"] = [name for name in names if (machines_dir() / name).exists()]
    return figures


def main() -> int:
    """Run it and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clones", type=int, default=10)
    parser.add_argument("--paused", type=int, default=50)
    options = parser.parse_args()
    figures = asyncio.run(measure(options.clones, options.paused))
    print(json.dumps(figures, indent=1))
    return 1 if figures["left"] or figures["paused_cpu_ticks"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
