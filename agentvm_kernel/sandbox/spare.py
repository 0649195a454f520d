"""A machine thawed ahead for the snapshot that will most likely be restored: of a restore, QEMU's start and the first words with the guest
are the longest part. It runs for the moment that those take, as it would when it is restored, and then waits, paused and connected. The
kernel process imports this module with time travel.
"""

import asyncio

from agentvm_kernel.errors import AgentVMError
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.machine import Machine
from agentvm_kernel.hypervisor.pages import available_memory
from agentvm_kernel.hypervisor.snapshot import Snapshot
from agentvm_kernel.hypervisor.thaw import thaw
from agentvm_kernel.log import get_logger
from agentvm_kernel.sandbox import pool
from agentvm_kernel.sandbox.lease import Lease, from_snapshot

log = get_logger(__name__)

AFTER_S = 0.25
"""A cell that follows a snapshot or a restore has the CPUs to itself for this long."""
KEPT_S = 900.0
"""So long a spare machine waits to be used."""


class Spare:
    """At most one machine that waits. Where memory is short, or all machines that the pool may have are in use, there is none."""

    def __init__(self) -> None:
        self._id = ""
        self._task: asyncio.Task[Lease | None] | None = None
        self._begun = False
        self._expiry: asyncio.TimerHandle | None = None

    def prepare(self, hypervisor: Hypervisor, snapshot: Snapshot, *, reseed: bool) -> None:
        """Have a machine made in the background, unless it is there already; one for another snapshot goes.

        Args:
            hypervisor: where.
            snapshot: what to thaw.
            reseed: as for `lease.from_snapshot`.
        """
        if self._id == snapshot.id and self._task is not None:
            return
        self.drop()
        self._id, self._begun = snapshot.id, False
        self._task = asyncio.ensure_future(self._make(hypervisor, snapshot, reseed))
        self._expiry = asyncio.get_running_loop().call_later(KEPT_S, self.drop)

    async def take(self, snapshot: Snapshot) -> Lease | None:
        """Return the machine for this snapshot, which runs now, and forget it; None where there is none."""
        if self._id != snapshot.id or self._task is None:
            return None
        if not self._begun:
            self.drop()
            return None
        task = self._forget()
        lease = await task if task is not None else None
        if lease is None:
            return None
        try:
            await lease.resume()
        except AgentVMError as error:
            log.warning("spare_lost", machine=lease.machine.name, error=str(error))
            lease.discard()
            return None
        lease.in_background(asyncio.to_thread(lease.machine.update_tags, state="leased"))
        return lease

    def drop_for(self, snapshot: Snapshot) -> None:
        """Give the machine back if it is for this snapshot."""
        if self._id == snapshot.id:
            self.drop()

    def drop(self) -> None:
        """Give the machine back, if there is one or will be one."""
        begun, task = self._begun, self._forget()
        if task is not None and not begun:
            task.cancel()
        elif task is not None:
            task.add_done_callback(_release)

    def _forget(self) -> "asyncio.Task[Lease | None] | None":
        if self._expiry is not None:
            self._expiry.cancel()
        task, self._task, self._id, self._expiry = self._task, None, "", None
        return task

    async def _make(self, hypervisor: Hypervisor, snapshot: Snapshot, reseed: bool) -> Lease | None:
        await asyncio.sleep(AFTER_S)
        self._begun = True
        try:
            machine = await asyncio.to_thread(_thaw, hypervisor, snapshot)
            if machine is None:
                return None
            lease = await from_snapshot(hypervisor, snapshot, reseed=reseed, spare=machine)
            try:
                await lease.pause()
            except BaseException:
                lease.discard()
                raise
        except (AgentVMError, OSError) as error:
            log.warning("no_spare", snapshot=snapshot.id, error=str(error))
            return None
        return lease


def _thaw(hypervisor: Hypervisor, snapshot: Snapshot) -> Machine | None:
    if available_memory() < 2 * (snapshot.hardware.memory_mib << 20) or not pool.has_room():
        return None
    return thaw(hypervisor, snapshot, state="spare")


def _release(task: "asyncio.Task[Lease | None]") -> None:
    if not task.cancelled() and task.exception() is None and (lease := task.result()) is not None:
        lease.discard()
