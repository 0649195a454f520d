"""libvirt's own way back, as a yardstick: an internal snapshot of a booted machine, and revertToSnapshot on it."""

import asyncio
from types import TracebackType

from agentvm_kernel.hypervisor.boot import boot_machine
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.machine import Machine
from agentvm_kernel.image import store
from agentvm_kernel.sandbox.cells import Cells, Result
from agentvm_kernel.sandbox.lease import Lease
from agentvm_kernel.sandbox.settings import load_settings
from agentvm_kernel.sandbox.templates import settle
from agentvm_kernel.transport.connection import open_connection


class Reverting:
    """A booted machine that libvirt puts back; used like a `Sandbox`."""

    _machine: Machine
    _lease: Lease
    _cells: Cells

    async def __aenter__(self) -> "Reverting":
        settings = load_settings()
        self._hypervisor = await asyncio.to_thread(Hypervisor, settings.uri)
        # With a memory limit libvirt would let QEMU lock that much when it reverts, which not every host allows it.
        self._hypervisor.limits_refused = True
        image = await asyncio.to_thread(store.find, settings.image)
        self._machine = await asyncio.to_thread(boot_machine, self._hypervisor, image, settings.profile)
        try:
            await settle(self._machine, timeout_s=settings.boot_timeout_s)
            await self._connect()
        except BaseException:
            await asyncio.to_thread(self._machine.destroy)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._lease.connection.close()
        await asyncio.to_thread(self._machine.destroy)
        await asyncio.to_thread(self._hypervisor.close)

    async def run(self, code: str) -> Result:
        """Run a cell."""
        return await self._cells.run(code, 60.0)

    async def snapshot(self, name: str) -> None:
        """Have libvirt make a snapshot of memory and disk, at a clean boundary as ours are."""
        await self._lease.connection.call("quiesce")
        await self._lease.connection.close()
        xml = f"<domainsnapshot><name>{name}</name></domainsnapshot>"
        await asyncio.to_thread(self._machine.domain.snapshotCreateXML, xml, 0)
        await self._connect()

    async def restore(self, name: str) -> None:
        """Have libvirt put the machine back, and connect to it."""
        await self._lease.connection.close()
        await asyncio.to_thread(self._revert, name)
        await self._connect()

    def _revert(self, name: str) -> None:
        domain = self._machine.domain
        domain.revertToSnapshot(domain.snapshotLookupByName(name, 0), 0)

    async def _connect(self) -> None:
        connection = await open_connection(self._machine.address, self._machine.secret, timeout_s=60)
        self._lease = Lease(self._machine, connection)
        self._cells = Cells(self._lease)
