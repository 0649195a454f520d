"""A lease: one machine that belongs to this process, with the authenticated connection to it.

`acquire` hands out a machine only after it has confirmed an identity of its own (clock, name, secret, entropy): one from the pool,
or one that it thaws. A machine that does not confirm is destroyed. The kernel process imports this module, so it imports little; what
boots or builds is imported when needed.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from agentvm_kernel.errors import AgentVMError, MachineLost, MachineTimeout
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.machine import Machine, spawn_releaser
from agentvm_kernel.hypervisor.snapshot import Snapshot
from agentvm_kernel.hypervisor.states import MachineState
from agentvm_kernel.hypervisor.tags import Owner
from agentvm_kernel.hypervisor.thaw import thaw
from agentvm_kernel.image import store
from agentvm_kernel.image.store import Image
from agentvm_kernel.log import get_logger
from agentvm_kernel.sandbox import pool, templates
from agentvm_kernel.sandbox.head_start import HeadStart
from agentvm_kernel.sandbox.identity import connect_thawed, wake
from agentvm_kernel.sandbox.settings import IdlePolicy, SandboxSettings
from agentvm_kernel.transport.connection import GuestConnection, open_connection

log = get_logger(__name__)

Progress = Callable[[str], None]

LOST_GRACE_S = 1.0
THAW_TIMEOUT_S = 30.0
# Machines whose owner was killed are removed by whoever comes next, but not while a first cell wants the CPUs.
REAP_AFTER_S = 3.0
KEEPER_AFTER_S = 1.0
KEEPER_EVERY_S = 15.0
ROOM_EVERY_S = 0.3


class Lease:
    """One machine of ours and the connection to its runtime.

    Attributes:
        machine: the libvirt domain behind it.
        connection: the authenticated connection; replaced by nothing, a lost machine is a lost lease.
        idle: what becomes of it while nobody uses it.
        lost: resolves with a sentence saying what happened, when the machine or the connection to it is gone.
    """

    def __init__(self, machine: Machine, connection: GuestConnection) -> None:
        self.machine = machine
        self.idle = IdlePolicy()
        self.connection = connection
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._released = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.in_background(self._watch_connection())
        self.in_background(self._watch_keeper())

    @property
    def description(self) -> str:
        """One line for people: which machine this is and how it runs."""
        return self.machine.description

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that nobody waits for; what fails is logged, and it is dropped when the lease ends."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._background_ended)

    def _background_ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._released:
            log.warning("lease_background", machine=self.machine.name, error=f"{type(error).__name__}: {error}")

    async def _watch_keeper(self) -> None:
        """See to it that the pool, where there is one, has a keeper."""
        await asyncio.sleep(KEEPER_AFTER_S)
        while True:
            await asyncio.to_thread(pool.ensure_keeper)
            await asyncio.sleep(KEEPER_EVERY_S)

    async def _watch_connection(self) -> None:
        reason = await self.connection.closed
        # libvirt's event usually says more (crashed, killed, shut down by the guest) but arrives a moment later.
        stopped = await asyncio.to_thread(self.machine.wait_stopped_reason, LOST_GRACE_S)
        if not self.lost.done():
            self.lost.set_result(stopped or f"the connection to machine {self.machine.name} ended: {reason}")

    def cpu_seconds(self) -> float:
        """Return the CPU time that its QEMU has used; 0 once it is gone."""
        try:
            return self.machine.cpu_seconds()
        except MachineLost:
            return 0.0

    async def pause(self) -> None:
        """Stop its CPUs; it keeps its state and its connection.

        Raises:
            AgentVMError: it does not run.
        """
        await asyncio.to_thread(self.machine.pause)

    async def resume(self) -> None:
        """Let it go on after `pause`, with the right time.

        Raises:
            AgentVMError: it is gone, or did not confirm its clock.
        """
        await asyncio.to_thread(self.machine.resume)
        await wake(self.connection, self.machine)

    async def release(self) -> None:
        """Give the machine back: it is destroyed by a detached process, nobody waits for that."""
        if self._let_go():
            await self.connection.close()
            await asyncio.to_thread(self.machine.release)

    def discard(self) -> None:
        """Give the machine back at once, where nobody can wait for anything; its connection ends with it."""
        if self._let_go():
            self.machine.release()

    def _let_go(self) -> bool:
        if self._released:
            return False
        self._released = True
        for task in self._tasks:
            task.cancel()
        if not self.lost.done():
            self.lost.set_result("the lease was released")
        return True


async def acquire(
    settings: SandboxSettings, *, on_progress: Progress | None = None, head_start: HeadStart | None = None
) -> Lease:
    """Lease a machine that has an identity of its own and whose kernel answers: from the pool if one is ready, else a thawed one.

    Args:
        settings: image, profile, libvirt URI and time limits.
        on_progress: called with a short sentence at each stage.
        head_start: may have a machine already.

    Raises:
        AgentVMError: no machine can be had; the message says why and what to do.
    """
    say = on_progress or (lambda _: None)
    lease = await _from_head_start(head_start) if head_start is not None else None
    if lease is None:
        lease = await _acquire(settings, say)
    lease.idle = settings.idle
    return lease


async def _acquire(settings: SandboxSettings, say: Progress) -> Lease:
    hypervisor = Hypervisor(settings.uri)
    image = await asyncio.to_thread(store.find, settings.image)
    lease = await _from_pool(hypervisor, image, settings.profile)
    if lease is None:
        await _wait_for_room(settings.acquire_timeout_s, say)

        async def thawed(template: Snapshot) -> Lease:
            say("Thawing a machine")
            return await from_snapshot(hypervisor, template)

        lease = await templates.use(
            hypervisor, image, settings.profile, thawed, timeout_s=settings.boot_timeout_s, on_progress=say
        )
        _reap_later(hypervisor)
    return lease


def _reap_later(hypervisor: Hypervisor) -> None:
    asyncio.get_running_loop().call_later(REAP_AFTER_S, spawn_releaser, None, hypervisor.uri)


async def _from_head_start(head_start: HeadStart) -> Lease | None:
    """Lease the machine that was begun before; None where there is none or it does not work out, and another one has to be found."""
    taking = asyncio.ensure_future(asyncio.to_thread(head_start.take))
    try:
        taken = await asyncio.shield(taking)
    except asyncio.CancelledError:
        taking.add_done_callback(_release_taken)
        raise
    if taken is None:
        return None
    machine, pooled = taken
    try:
        if pooled:
            return await _take(machine)
        lease = await _lease_thawed(machine, reseed=True)
    except (AgentVMError, OSError) as error:
        log.warning("head_start_lost", machine=machine.name, error=str(error))
        return None
    _reap_later(machine.hypervisor)
    return lease


async def from_snapshot(
    hypervisor: Hypervisor,
    snapshot: Snapshot,
    *,
    reseed: bool = True,
    spare: Machine | None = None,
) -> Lease:
    """Lease a machine thawed from a snapshot, its identity renewed.

    Args:
        hypervisor: where.
        snapshot: what to thaw.
        reseed: it is a clone; False for a user's own restored machine, whose random numbers go on as they were.
        spare: a paused machine that was thawed from it before.

    Raises:
        AgentVMError: it cannot be thawed or does not confirm its identity.
    """
    thawing = asyncio.ensure_future(asyncio.to_thread(_machine_of, hypervisor, snapshot, spare))
    try:
        machine = await asyncio.shield(thawing)
    except asyncio.CancelledError:
        # The thread goes on, and nobody will know of its machine.
        thawing.add_done_callback(_release_unwanted)
        raise
    return await _lease_thawed(machine, reseed=reseed)


async def _lease_thawed(machine: Machine, *, reseed: bool) -> Lease:
    connection = await _start(machine, connect_thawed(machine, reseed=reseed, timeout_s=THAW_TIMEOUT_S))
    return Lease(machine, connection)


async def _from_pool(hypervisor: Hypervisor, image: Image, profile: str) -> Lease | None:
    """Claim a ready machine; one that turns out to be broken is discarded and the next one tried."""
    key = pool.key(image, profile, hypervisor.uri)
    while (name := pool.claim(key)) is not None:
        try:
            return await _take(await asyncio.to_thread(Machine.attach, hypervisor, name))
        except (AgentVMError, OSError) as error:
            log.warning("pooled_machine_unusable", machine=name, error=str(error))
            await asyncio.to_thread(spawn_releaser, name, hypervisor.uri)
    return None


async def _take(machine: Machine) -> Lease:
    connection = await _start(machine, _connect_pooled(machine))
    lease = Lease(machine, connection)
    lease.in_background(asyncio.to_thread(machine.update_tags, owner=Owner.current(), state="leased"))
    return lease


async def _connect_pooled(machine: Machine) -> GuestConnection:
    connection = await open_connection(machine.address, machine.secret, timeout_s=THAW_TIMEOUT_S)
    try:
        # It has had an identity of its own since it was prepared; only its clock stood still.
        await wake(connection, machine)
    except BaseException:
        await connection.close()
        raise
    return connection


async def _start(machine: Machine, connecting: Coroutine[Any, Any, GuestConnection]) -> GuestConnection:
    """Let a paused machine run and connect to it at the same time: what we say first waits for it. Where either fails, it is released."""
    connection = asyncio.ensure_future(connecting)
    resumed = asyncio.ensure_future(asyncio.to_thread(_resume, machine))
    try:
        await asyncio.gather(resumed, connection)
        return connection.result()
    except BaseException:
        connection.cancel()
        # A thread cannot be cancelled, and what it does must not come after the end.
        await asyncio.wait({resumed, connection})
        if not connection.cancelled() and connection.exception() is None:
            await connection.result().close()
        await asyncio.to_thread(machine.release)
        raise


def _resume(machine: Machine) -> None:
    if machine.state is not MachineState.RUNNING:
        machine.resume()


def _machine_of(hypervisor: Hypervisor, snapshot: Snapshot, spare: Machine | None) -> Machine:
    return spare or thaw(hypervisor, snapshot)


def _release_taken(taking: "asyncio.Future[tuple[Machine, bool] | None]") -> None:
    if not taking.cancelled() and taking.exception() is None and (taken := taking.result()) is not None:
        taken[0].release()


def _release_unwanted(thawing: "asyncio.Future[Machine]") -> None:
    if not thawing.cancelled() and thawing.exception() is None:
        thawing.result().release()


async def _wait_for_room(timeout_s: float, say: Progress) -> None:
    """Wait until the pool's configuration allows for one more machine.

    Raises:
        MachineTimeout: it does not within `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while not pool.has_room():
        if time.monotonic() > deadline:
            raise MachineTimeout(
                f"All {pool.load_config().maximum} machines of the pool are in use, and none was given back within {timeout_s:g} s.",
                hint="End a notebook, or allow for more: agentvm pool resize --maximum N.",
            )
        say("Waiting for another notebook to give its machine back")
        await asyncio.sleep(ROOM_EVERY_S)
