"""`%snapshot`, `%restore` and `%undo`."""

import argparse
import time
from collections.abc import Sequence

from agentvm_kernel.jupyter.magics.arguments import HostMagic, Options, UsageError
from agentvm_kernel.jupyter.magics.cell import Cell
from agentvm_kernel.jupyter.magics.notebook import Notebook

ABOUT_SNAPSHOT = """\
Keep the machine as it is now: variables, running processes, files. It stands still for a moment and runs on.

  %snapshot before-training             go back to it with %restore before-training
  %snapshot clean -d "after cleaning"   with a description
  %snapshot                             show all snapshots, and where the machine is among them
"""
ABOUT_RESTORE = """\
Put the machine back to a snapshot: variables, processes and files are what they were. The notebook stays connected.
"""
ABOUT_UNDO = """\
Put the machine back to the state before the last cell, or before the last N cells.

It takes an automatic snapshot before every cell; switch that on first with: %vm autocheckpoint on
"""


class SnapshotMagic(HostMagic):
    """`%snapshot`."""

    name = "snapshot"

    def options(self) -> Options:
        """Describe its line."""
        options = Options("%snapshot", ABOUT_SNAPSHOT)
        options.add_argument("name", nargs="?", metavar="NAME", help="what to call it")
        options.add_argument("-d", "--description", default="", metavar="TEXT", help="shown in the list")
        options.add_argument("--list", action="store_true", help="show all snapshots")
        options.add_argument("--delete", metavar="NAME", help="delete a snapshot; later ones stay whole")
        options.add_argument(
            "--export", action="store_true", help="keep it for good, for all notebooks, also when it exists already"
        )
        return options

    async def run(self, cell: Cell, arguments: argparse.Namespace, body: str) -> None:
        """Make, list, delete or export."""
        name: str | None = arguments.name
        if sum((bool(name), arguments.list, arguments.delete is not None)) > 1:
            raise UsageError("A NAME, --list and --delete exclude each other.")
        if arguments.export and name is None:
            raise UsageError("--export needs the NAME of a snapshot.")
        if arguments.description and name is None:
            raise UsageError("-d needs the NAME of a snapshot.")
        notebook = cell.notebook
        if arguments.delete is not None:
            await notebook.travel.delete(arguments.delete)
            cell.write(f"Snapshot {arguments.delete} is deleted.")
        elif name is None:
            cell.display({"text/plain": notebook.travel.as_text(), "text/html": notebook.travel.as_html()})
        elif arguments.export and name in notebook.travel.names():
            await self._export(cell, name)
        else:
            await self._make(cell, name, arguments.description)
            if arguments.export:
                await self._export(cell, name)

    async def _make(self, cell: Cell, name: str, description: str) -> None:
        lease = cell.notebook.lease
        async with cell.machine_standing_still():
            made = await cell.notebook.travel.snapshot(lease, name, description=description)
        cell.write(
            f"Snapshot {made.name}: {made.size() / 1024**2:.1f} MiB, the machine stood still for {made.pause_s * 1000:.0f} ms."
        )

    async def _export(self, cell: Cell, name: str) -> None:
        await cell.notebook.travel.export(name)
        cell.write(f"Snapshot {name} is kept for good; any notebook can restore it.")

    def words(self, notebook: Notebook, before: Sequence[str]) -> list[str]:
        """Names after --delete, and after --export."""
        return notebook.travel.names() if before and before[-1] in ("--delete", "--export") else []


class RestoreMagic(HostMagic):
    """`%restore`."""

    name = "restore"

    def options(self) -> Options:
        """Describe its line."""
        options = Options("%restore", ABOUT_RESTORE)
        options.add_argument("name", metavar="NAME", help="of a snapshot; %%snapshot --list shows all")
        return options

    async def run(self, cell: Cell, arguments: argparse.Namespace, body: str) -> None:
        """Go back."""
        began = time.monotonic()
        notebook = cell.notebook
        async with cell.machine_standing_still():
            lease = await notebook.travel.restore(arguments.name, notebook.lease_if_any)
            notebook.use(lease)
        cell.write(f"The machine is at snapshot {arguments.name} again, after {time.monotonic() - began:.2f} s.")

    def words(self, notebook: Notebook, before: Sequence[str]) -> list[str]:
        """The names of all snapshots."""
        return [] if before else notebook.travel.names()


class UndoMagic(HostMagic):
    """`%undo`."""

    name = "undo"

    def options(self) -> Options:
        """Describe its line."""
        options = Options("%undo", ABOUT_UNDO)
        options.add_argument("cells", nargs="?", type=int, default=1, metavar="N", help="how many cells to take back")
        return options

    async def run(self, cell: Cell, arguments: argparse.Namespace, body: str) -> None:
        """Go back."""
        count: int = arguments.cells
        if count < 1:
            raise UsageError("N is 1 or more.", hint="%undo 2 takes the last two cells back.")
        began = time.monotonic()
        notebook = cell.notebook
        async with cell.machine_standing_still():
            lease = await notebook.travel.undo(count, notebook.lease_if_any)
            notebook.use(lease)
        what = "the last cell" if count == 1 else f"the last {count} cells"
        cell.write(f"The machine is as it was before {what}, after {time.monotonic() - began:.2f} s.")


MAGICS = (SnapshotMagic(), RestoreMagic(), UndoMagic())
