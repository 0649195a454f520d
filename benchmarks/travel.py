"""Time travel: what a snapshot, a restore and ten forks take, with 50 MB of data over pandas; and libvirt's own revert beside it."""

import asyncio
import time
from collections.abc import Iterator

from agentvm_kernel.hypervisor import snapshot as snapshots
from agentvm_kernel.sandbox.sandbox import Sandbox
from benchmarks.harness import Figure, Plan, Table, median_of, ratio_of, wait_quiet
from benchmarks.kernels import OURS, Kernel, Kernels
from benchmarks.libvirt_revert import Reverting

MEGABYTE = 1_000_000
DATA_MB = 50
SIZES_MB = (1, 10, 100, 500)
FORKS = 10
IMPORTS = "import pandas as pd, numpy as np"


def data(mark: int, megabytes: int = DATA_MB) -> str:
    """Return a cell that fills memory with numbers, no page like another; `mark` tells apart what several such cells made."""
    return f"data = np.arange({mark}, {mark} + {megabytes * MEGABYTE // 8}); frame = pd.DataFrame({{'mark': [{mark}]}})"


MARK = "int(frame.mark[0]) if int(data[0]) == int(frame.mark[0]) else 'torn'"


def measure(plan: Plan, kernels: Kernels) -> Iterator[tuple[str, Figure | Table]]:
    """Yield snapshot_s and restore_s, as a notebook sees them."""
    with kernels.started(OURS) as notebook:
        notebook.ask(IMPORTS)
        pauses, cells, restores = [], [], []
        for turn in plan.turns(10, 60):
            notebook.ask(data(turn + 1))
            wait_quiet(2)
            name = f"turn-{turn}"
            seconds, _ = notebook.ask(f"%snapshot {name}")
            cells.append(seconds)
            pauses.append(_pause_of(name))
            notebook.ask(data(-1))
            wait_quiet(2)
            restores.append(_restore_s(notebook, name, turn + 1))
        about = f"the cell itself took {sorted(cells)[len(cells) // 2]:.2f} s"
        yield "snapshot_s", median_of(pauses, "s", about)
        yield "restore_s", median_of(restores, "s", "both cells, seen by the client")


def measure_against_libvirt(plan: Plan, kernels: object) -> Iterator[tuple[str, Figure]]:
    """Yield restore_vs_libvirt: from the call to the reply of a cell, for both through Python."""
    yield "restore_vs_libvirt", asyncio.run(_against_libvirt(plan))


def measure_forks(plan: Plan, kernels: object) -> Iterator[tuple[str, Figure]]:
    """Yield fork10_s."""
    yield "fork10_s", asyncio.run(_forks(plan))


def measure_sizes(plan: Plan, kernels: object) -> Iterator[tuple[str, Table]]:
    """Yield the table of what a snapshot takes by how much has changed since its parent."""
    yield "snapshot_sizes", asyncio.run(_sizes(plan))


def _pause_of(name: str) -> float:
    found = [one for one in snapshots.list_all() if one.name == name]
    return max(found, key=lambda one: one.created).pause_s


def _restore_s(notebook: Kernel, name: str, mark: int) -> float:
    began = time.perf_counter()
    notebook.ask(f"%restore {name}")
    elapsed_before_cell = time.perf_counter() - began
    in_cell, text = notebook.ask(f"print({MARK})")
    if text.strip() != str(mark):
        raise RuntimeError(f"after %restore the data are those of {text.strip()} and not of {mark}")
    return elapsed_before_cell + in_cell


async def _against_libvirt(plan: Plan) -> Figure:
    libvirts: list[float] = []
    ours: list[float] = []
    async with await Sandbox.create() as sandbox, Reverting() as reverting:
        for one in (sandbox, reverting):
            (await one.run(IMPORTS)).require_ok()
            (await one.run(data(1))).require_ok()
            await one.snapshot("here")
        for _ in plan.turns(8, 60):
            for one, times in ((reverting, libvirts), (sandbox, ours)):
                (await one.run(data(2))).require_ok()
                await asyncio.to_thread(wait_quiet)
                began = time.perf_counter()
                await one.restore("here")
                value = (await one.run(MARK)).require_ok().value
                times.append(time.perf_counter() - began)
                if value != "1":
                    raise RuntimeError(f"the data are those of {value} and not of 1")
    return ratio_of(libvirts, ours, "s")


async def _forks(plan: Plan) -> Figure:
    times = []
    async with await Sandbox.create() as sandbox:
        (await sandbox.run(IMPORTS)).require_ok()
        (await sandbox.run(data(1))).require_ok()
        for _ in plan.turns(5, 60):
            await asyncio.to_thread(wait_quiet, 15)
            began = time.perf_counter()
            clones = await sandbox.fork(FORKS)
            results = await asyncio.gather(*(clone.run(MARK) for clone in clones))
            times.append(time.perf_counter() - began)
            await asyncio.gather(*(clone.close() for clone in clones))
            values = {result.require_ok().value for result in results}
            if values != {"1"}:
                raise RuntimeError(f"the clones' data are those of {values} and not of 1")
    return median_of(times, "s", f"{FORKS} clones, each having run a cell over {DATA_MB} MB of data")


async def _sizes(plan: Plan) -> Table:
    rows: list[list[float]] = []
    async with await Sandbox.create() as sandbox:
        (await sandbox.run(IMPORTS)).require_ok()
        for megabytes in SIZES_MB:
            pauses, wholes, disks = [], [], []
            for turn in plan.turns(3, 20, least=1):
                (await sandbox.run("data = None")).require_ok()
                before = await sandbox.snapshot(f"before-{megabytes}-{turn}".replace("before", "base"))
                await sandbox.restore(before.name)
                (await sandbox.run(data(turn, megabytes))).require_ok()
                await asyncio.to_thread(wait_quiet)
                began = time.perf_counter()
                made = await sandbox.snapshot(f"filled-{megabytes}-{turn}")
                wholes.append(time.perf_counter() - began)
                pauses.append(made.pause_s)
                disks.append(made.size() / MEGABYTE)
                await sandbox.restore(before.name)
                for one in (made, before):
                    await sandbox.history.delete(one.name)
            rows.append([megabytes, *(sorted(values)[len(values) // 2] for values in (pauses, wholes, disks))])
    return Table(
        "A snapshot by how much has changed since its parent",
        ["changed MB", "pause s", "whole s", "disk MB"],
        rows,
    )
