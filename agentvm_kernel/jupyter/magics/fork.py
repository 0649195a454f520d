"""`%%fork`: one cell in several copies of the machine at once, side by side."""

import argparse
import asyncio
import contextlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentvm_kernel.errors import AgentVMError, MachineError
from agentvm_kernel.jupyter.magics import render
from agentvm_kernel.jupyter.magics.arguments import HostMagic, Options, UsageError
from agentvm_kernel.jupyter.magics.cell import Cell
from agentvm_kernel.jupyter.magics.notebook import Notebook
from agentvm_kernel.jupyter.magics.render import Column
from agentvm_kernel.sandbox import pool
from agentvm_kernel.sandbox.cells import Cells, Result
from agentvm_kernel.sandbox.lease import Lease

ABOUT = """\
Run the cell in N copies of the machine at once and show their outputs side by side.

Each copy has all variables, processes and files, random numbers of its own, and a variable FORK, from 0 to N-1. The
notebook's own machine is not touched, unless one of the copies is kept in its place.

  %%fork 3
  rate = [0.1, 0.01, 0.001][FORK]
  train(rate)
"""
REDRAW_S = 0.15
"""Outputs of running copies are drawn so often at most, in seconds."""
REDRAW_RATE = 1_000_000
"""So many characters a second at most, since each drawing holds everything."""
INTERRUPT_S = 10.0
"""So long copies may take to notice an interrupt, in seconds."""


class ForkError(MachineError):
    """All copies failed, or the one to be kept."""


@dataclass
class Branch:
    """One copy at work."""

    lease: Lease
    column: Column
    began: float
    result: Result | None = None
    lost: AgentVMError | None = None

    @property
    def problem(self) -> str:
        """What ended it before its end; empty where nothing did."""
        if self.lost is not None:
            return str(self.lost)
        if self.result is None or self.result.error is None:
            return ""
        return f"{self.result.error.name}: {self.result.error.message}"


class Panel:
    """What the cell shows: the copies' outputs, drawn anew as they come, but not too often."""

    def __init__(self, cell: Cell, columns: Sequence[Column]) -> None:
        self._cell = cell
        self._columns = columns
        self._id = uuid.uuid4().hex
        self._changed = asyncio.Event()
        self._drawn = False

    def changed(self) -> None:
        """There is more to see."""
        self._changed.set()

    def draw(self) -> int:
        """Show how things stand; return how many characters that took."""
        self._changed.clear()
        data = {"text/plain": render.as_text(self._columns), "text/html": render.as_html(self._columns)}
        self._cell.display(data, display_id=self._id, update=self._drawn)
        self._drawn = True
        return sum(map(len, data.values()))

    async def keep_drawn(self) -> None:
        """Draw whenever something has changed, until cancelled."""
        while True:
            await self._changed.wait()
            size = self.draw()
            await asyncio.sleep(max(REDRAW_S, size / REDRAW_RATE))


class ForkMagic(HostMagic):
    """`%%fork`."""

    name = "fork"
    is_cell_magic = True

    def options(self) -> Options:
        """Describe its line."""
        options = Options("%%fork", ABOUT)
        options.add_argument("count", type=int, metavar="N", help="how many copies")
        options.add_argument(
            "--keep", type=int, metavar="I", help="go on with copy I as the notebook's machine, where its cell succeeds"
        )
        return options

    def words(self, notebook: Notebook, before: Sequence[str]) -> list[str]:
        """A number."""
        return ["2", "3", "4", "8"] if not before else []

    async def run(self, cell: Cell, arguments: argparse.Namespace, body: str) -> None:
        """Fork, run, show, and keep one or none."""
        count: int = arguments.count
        keep: int | None = arguments.keep
        limit = cell.notebook.settings.max_forks
        if not 1 <= count <= limit:
            raise UsageError(f"{count} copies cannot be made: 1 to {limit} are possible here.")
        if keep is not None and not 0 <= keep < count:
            raise UsageError(f"There is no copy {keep} to keep: they are numbered 0 to {count - 1}.")
        if not body.strip():
            raise UsageError("There is nothing to run.", hint="Write the code below the line with %%fork.")
        room = pool.load_config().maximum - pool.count_machines()
        if pool.load_config().maximum and room < count:
            raise MachineError(
                f"There is room for {max(room, 0)} more machines on this host, not for {count}.",
                hint="Make fewer copies, end another notebook, or allow for more: agentvm pool resize --maximum N.",
            )
        columns = [Column(f"FORK = {number}") for number in range(count)]
        panel = Panel(cell, columns)
        panel.draw()
        lease = cell.notebook.lease
        async with cell.machine_standing_still():
            leases = await cell.notebook.travel.fork(lease, count)
        now = time.monotonic()
        branches = [Branch(lease, column, now) for lease, column in zip(leases, columns, strict=True)]
        kept: Branch | None = None
        drawing = asyncio.ensure_future(panel.keep_drawn())
        try:
            await self._run_all(cell, branches, body, panel)
            drawing.cancel()
            panel.draw()
            kept = self._conclude(cell, branches, keep)
        finally:
            drawing.cancel()
            await asyncio.gather(*(branch.lease.release() for branch in branches if branch is not kept))

    async def _run_all(self, cell: Cell, branches: list[Branch], body: str, panel: Panel) -> None:
        timeout_s = cell.notebook.limits.timeout_s or None
        running = [
            asyncio.ensure_future(self._run_one(branch, number, body, panel, timeout_s))
            for number, branch in enumerate(branches)
        ]
        interrupted = asyncio.ensure_future(cell.interrupted.wait())
        everything = asyncio.gather(*running)
        try:
            await asyncio.wait((everything, interrupted), return_when=asyncio.FIRST_COMPLETED)
            if not everything.done():
                for branch in branches:
                    with contextlib.suppress(AgentVMError):
                        await branch.lease.connection.call("kernel.interrupt", timeout_s=INTERRUPT_S)
                await asyncio.wait((everything,), timeout=INTERRUPT_S)
            if everything.done():
                everything.result()
        finally:
            interrupted.cancel()
            everything.cancel()

    async def _run_one(self, branch: Branch, number: int, body: str, panel: Panel, timeout_s: float | None) -> None:
        column = branch.column
        column.state = "running"
        panel.changed()

        def on_output(outputs: list[dict[str, Any]]) -> None:
            column.outputs = outputs
            panel.changed()

        cells = Cells(branch.lease)
        try:
            await cells.run(f"FORK = {number}", store=False)
            branch.result = await cells.run(body, timeout_s, store=False, on_output=on_output)
        except AgentVMError as error:
            branch.lost = error
            column.outputs = [
                *column.outputs,
                {"output_type": "error", "ename": type(error).__name__, "evalue": str(error)},
            ]
        column.state = f"{'failed' if branch.problem else 'done'} after {time.monotonic() - branch.began:.1f} s"
        panel.changed()

    def _conclude(self, cell: Cell, branches: list[Branch], keep: int | None) -> Branch | None:
        """Say what failed, and put the copy to be kept into the place of the notebook's machine; return that one."""
        failed = {number: branch.problem for number, branch in enumerate(branches) if branch.problem}
        if cell.interrupted.is_set():
            return None
        if keep is not None:
            if keep in failed:
                raise ForkError(
                    f"Copy {keep} failed ({failed[keep]}), so the notebook goes on with the machine it had."
                )
            cell.notebook.use(branches[keep].lease)
            cell.notebook.touched()
            cell.write(f"The notebook goes on with copy {keep}.")
            return branches[keep]
        if len(failed) == len(branches):
            raise ForkError(f"All copies failed; the first with {failed[0]}")
        if failed:
            listed = "; ".join(f"{number} ({problem})" for number, problem in failed.items())
            cell.write(f"agentvm: {len(failed)} of {len(branches)} copies failed: {listed}", name="stderr")
        return None


MAGICS = (ForkMagic(),)
