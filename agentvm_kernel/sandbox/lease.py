"""A lease: one machine that belongs to this process, with the authenticated connection to it.

`acquire` hands out a machine only after its identity has been renewed and confirmed (clock, name, secret, entropy); a machine that does
not confirm is destroyed. The kernel process imports this module, so it imports little; what boots or builds is imported when needed.
"""

import asyncio
import base64
import os
import time
import uuid
from collections.abc import Callable
from typing import Any

from agentvm_kernel.errors import MachineLost
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.machine import Machine, spawn_releaser
from agentvm_kernel.hypervisor.snapshot import Snapshot
from agentvm_kernel.hypervisor.thaw import thaw
from agentvm_kernel.image import store
from agentvm_kernel.log import get_logger
from agentvm_kernel.sandbox import templates
from agentvm_kernel.sandbox.settings import SandboxSettings
from agentvm_kernel.transport.connection import GuestConnection, open_connection

log = get_logger(__name__)

Progress = Callable[[str], None]

RENEW_TIMEOUT_S = 20.0
LOST_GRACE_S = 1.0
THAW_TIMEOUT_S = 30.0
# Machines whose owner was killed are removed by whoever comes next, but not while a first cell wants the CPUs.
REAP_AFTER_S = 3.0


class Lease:
    """One machine of ours and the connection to its runtime.

    Attributes:
        machine: the libvirt domain behind it.
        connection: the authenticated connection; replaced by nothing, a lost machine is a lost lease.
        lost: resolves with a sentence saying what happened, when the machine or the connection to it is gone.
    """

    def __init__(self, hypervisor: Hypervisor, machine: Machine, connection: GuestConnection) -> None:
        self.machine = machine
        self.connection = connection
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._hypervisor = hypervisor
        self._released = False
        self._watch = asyncio.create_task(self._watch_connection())

    @property
    def description(self) -> str:
        """One line for people: which machine this is and how it runs."""
        return self.machine.description

    async def _watch_connection(self) -> None:
        reason = await self.connection.closed
        # libvirt's event usually says more (crashed, killed, shut down by the guest) but arrives a moment later.
        stopped = await asyncio.to_thread(self.machine.wait_stopped_reason, LOST_GRACE_S)
        if not self.lost.done():
            self.lost.set_result(stopped or f"the connection to machine {self.machine.name} ended: {reason}")

    async def release(self) -> None:
        """Give the machine back: it is destroyed by a detached process, nobody waits for that."""
        if self._released:
            return
        self._released = True
        self._watch.cancel()
        if not self.lost.done():
            self.lost.set_result("the lease was released")
        await self.connection.close()
        await asyncio.to_thread(self.machine.release)


async def acquire(settings: SandboxSettings, *, on_progress: Progress | None = None) -> Lease:
    """Lease a machine whose identity has been renewed and whose kernel answers.

    Args:
        settings: image, profile, libvirt URI and time limits.
        on_progress: called with a short sentence at each stage.

    Raises:
        AgentVMError: no machine can be had; the message says why and what to do.
    """
    say = on_progress or (lambda _: None)
    hypervisor = await asyncio.to_thread(Hypervisor, settings.uri)
    image = store.find(settings.image)
    template = await templates.ensure(
        hypervisor, image, settings.profile, timeout_s=settings.boot_timeout_s, on_progress=say
    )
    say("Thawing a machine")
    machine = await asyncio.to_thread(_thaw_running, hypervisor, template)
    try:
        connection = await open_connection(machine.address, machine.secret, timeout_s=THAW_TIMEOUT_S)
        try:
            await renew_identity(connection, machine, reseed=True)
        except BaseException:
            await connection.close()
            raise
    except BaseException:
        await asyncio.to_thread(machine.release)
        raise
    asyncio.get_running_loop().call_later(REAP_AFTER_S, spawn_releaser, None, hypervisor.uri)
    return Lease(hypervisor, machine, connection)


def _thaw_running(hypervisor: Hypervisor, snapshot: Snapshot) -> Machine:
    machine = thaw(hypervisor, snapshot)
    try:
        machine.resume()
    except BaseException:
        machine.release()
        raise
    return machine


async def renew_identity(connection: GuestConnection, machine: Machine, *, reseed: bool) -> dict[str, Any]:
    """Give the machine an identity of its own and wait until it has confirmed every part of it.

    Args:
        connection: authenticated with the machine's current secret.
        machine: whose secret is replaced by a new one.
        reseed: also reseed `random` and `numpy.random` in the kernel process (not for a user's own restored machine).

    Raises:
        MachineLost: the machine did not confirm; it must not be handed out (HAZARDS 1-4, 6).
    """
    secret = os.urandom(32)
    wanted = {
        "entropy": base64.b64encode(os.urandom(256)).decode(),
        "time_ns": time.time_ns(),
        "hostname": machine.name,
        "machine_id": uuid.uuid4().hex,
        "secret": base64.b64encode(secret).decode(),
        "reseed": reseed,
    }
    confirmed: dict[str, Any] = await connection.call("renew", wanted, timeout_s=RENEW_TIMEOUT_S)
    missing = [
        key
        for key in ("entropy", "time", "hostname", "machine_id", "boot_id", "secret")
        if confirmed.get(key) is not True
    ]
    if missing or (reseed and confirmed.get("reseed") is not True):
        raise MachineLost(
            f"Machine {machine.name} did not confirm its new identity ({', '.join(missing) or 'reseed'}).",
            hint="It was discarded; run the cell again to get another one.",
        )
    machine.secret = secret
    return confirmed
