"""Sandboxes for programs: run code in a machine of its own, keep its state, go back to it, run copies of it.

    async with await Sandbox.create(profile="light") as sandbox:
        await sandbox.run("import pandas as pd; df = pd.DataFrame({'a': [1, 2]})")
        await sandbox.snapshot("loaded")
        for copy in await sandbox.fork(3):
            async with copy:
                print((await copy.run("df.a.sum()")).value)
        await sandbox.restore("loaded")

All of it is asyncio; nothing blocks the loop. Imports nothing heavy.
"""

import asyncio
import uuid
from typing import Any

from agentvm_kernel.errors import MachineLost
from agentvm_kernel.hypervisor.snapshot import Snapshot
from agentvm_kernel.log import get_logger
from agentvm_kernel.sandbox import snapshot_store
from agentvm_kernel.sandbox.cells import Cells, Result
from agentvm_kernel.sandbox.lease import Lease, Progress, acquire
from agentvm_kernel.sandbox.settings import SandboxSettings, load_settings
from agentvm_kernel.sandbox.timetravel import TimeTravel

log = get_logger(__name__)

__all__ = ["Result", "Sandbox"]


class Sandbox:
    """A machine to run code in. Made by `create`, `from_snapshot` or `fork`; use it as an async context manager, or call `close`.

    Attributes:
        history: its snapshots (`TimeTravel`): delete, export, undo, the tree as text.
    """

    def __init__(self, lease: Lease, history: TimeTravel, settings: SandboxSettings, *, forked: bool = False) -> None:
        self.history = history
        self._settings = settings
        self._forked = forked
        self._lease: Lease | None = None
        self._cells: Cells | None = None
        self._attach(lease)

    @classmethod
    async def create(
        cls, settings: SandboxSettings | None = None, *, on_progress: Progress | None = None, **overrides: Any
    ) -> "Sandbox":
        """Return a sandbox with a fresh machine, from the pool where there is one.

        Args:
            settings: None takes the configuration file and the environment.
            on_progress: called with a short sentence at each stage.
            overrides: single settings, such as profile="light".

        Raises:
            AgentVMError: no machine can be had; the message says why and what to do.
        """
        chosen = await asyncio.to_thread(load_settings, **overrides) if settings is None else settings
        return cls(await acquire(chosen, on_progress=on_progress), TimeTravel(chosen, _new_session()), chosen)

    @classmethod
    async def from_snapshot(cls, name: str, settings: SandboxSettings | None = None, **overrides: Any) -> "Sandbox":
        """Return a sandbox that goes on where an exported snapshot was taken, with an identity and random numbers of its own.

        Args:
            name: of the snapshot, or its id.
            settings: as for `create`.
            overrides: as for `create`.

        Raises:
            SnapshotError: there is none of this name, or it does not fit this host.
        """
        chosen = await asyncio.to_thread(load_settings, **overrides) if settings is None else settings
        lease = await snapshot_store.start_from(name, chosen)
        return cls(lease, TimeTravel(chosen, _new_session()), chosen)

    async def __aenter__(self) -> "Sandbox":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def lease(self) -> Lease:
        """The machine and the connection to it.

        Raises:
            MachineLost: the sandbox is closed.
        """
        if self._lease is None:
            raise MachineLost("The sandbox is closed.")
        return self._lease

    @property
    def description(self) -> str:
        """One line for people: which machine this is and how it runs."""
        return self.lease.description

    async def run(self, code: str, *, timeout_s: float | None = None) -> Result:
        """Run a cell; variables stay for the next one. See `Cells.run` for what is raised; what the code raises is in the result.

        Args:
            code: Python, or what else IPython takes.
            timeout_s: how long it may take, in seconds.
        """
        if self._cells is None:
            raise MachineLost("The sandbox is closed.")
        return await self._cells.run(code, timeout_s)

    async def snapshot(self, name: str, *, description: str = "") -> Snapshot:
        """Keep the present state under a name, until the sandbox is closed or for good (`history.export`). See `TimeTravel.snapshot`."""
        return await self.history.snapshot(self.lease, name, description=description)

    async def restore(self, name: str) -> None:
        """Go back to a snapshot, also when the machine has been lost. See `TimeTravel.restore`."""
        before = self.lease
        self._attach(await self.history.restore(name, before))
        await before.release()

    async def fork(self, count: int) -> "list[Sandbox]":
        """Return running copies of this sandbox, each with an identity and random numbers of its own. See `TimeTravel.fork`."""
        leases = await self.history.fork(self.lease, count)
        return [
            Sandbox(lease, TimeTravel(self._settings, self.history.session), self._settings, forked=True)
            for lease in leases
        ]

    async def close(self) -> None:
        """Give the machine back and delete the snapshots that were not exported. Does nothing the second time."""
        lease, self._lease, self._cells = self._lease, None, None
        if lease is None:
            return
        self.history.leave()
        await lease.release()
        if not self._forked:
            await self.history.end()

    def _attach(self, lease: Lease) -> None:
        self._lease, self._cells = lease, Cells(lease)


def _new_session() -> str:
    return f"sandbox-{uuid.uuid4().hex}"
