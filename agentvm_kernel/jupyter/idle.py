"""Pauses a machine that nobody uses, wakes it for the next request, and gives it back when nobody comes for very long.

A paused machine takes no CPU time and keeps all its state. Imports nothing heavy.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from agentvm_kernel.errors import AgentVMError
from agentvm_kernel.jupyter.backend import Lease
from agentvm_kernel.log import get_logger
from agentvm_kernel.transport.connection import GuestConnection

log = get_logger(__name__)

SOON_S = 0.05
WORKING_CPUS = 0.2
"""Share of one CPU above which something works in the machine, although no cell does; an idle machine takes 0.02 and less."""


class Door(Protocol):
    """What requests come through; `proxy.Proxy` is one."""

    def idle_since(self) -> float | None:
        """Return when the last request ended, on the monotonic clock; None while one is being answered."""

    def park(self) -> bool:
        """Hold requests from now on, as while there is no machine; False, and nothing is held, while one is being answered."""

    def attach(self, connection: GuestConnection) -> None:
        """Forward again, first of all what was held."""


class IdleWatch:
    """Watches one machine.

    Args:
        lease: the machine; its `idle` says after how long.
        door: tells whether it is used.
        on_cull: called when it has been paused for too long.
        on_failure: called with what happened when it could not be woken.
    """

    def __init__(
        self, lease: Lease, door: Door, *, on_cull: Callable[[], None], on_failure: Callable[[AgentVMError], None]
    ) -> None:
        self._lease = lease
        self._door = door
        self._on_cull = on_cull
        self._on_failure = on_failure
        self._wanted = asyncio.Event()
        self._now = asyncio.Event()
        self.paused = False
        self._task = asyncio.create_task(self._run())

    def wake(self) -> None:
        """A request waits."""
        self._wanted.set()

    def pause_now(self) -> None:
        """Pause it as soon as no request is being answered, whatever the settings say."""
        self._now.set()

    def stop(self) -> None:
        """Leave the machine as it is."""
        self._task.cancel()

    async def _run(self) -> None:
        try:
            while True:
                await self._until_idle()
                if not self._door.park():
                    continue
                self._now.clear()
                self._wanted.clear()
                await self._lease.pause()
                self.paused = True
                log.info("machine_paused", machine=self._lease.description)
                try:
                    async with asyncio.timeout(self._lease.idle.cull_s or None):
                        await self._wanted.wait()
                except TimeoutError:
                    self._on_cull()
                    return
                await self._lease.resume()
                self.paused = False
                self._door.attach(self._lease.connection)
        except AgentVMError as error:
            self._on_failure(error)

    async def _until_idle(self) -> None:
        pause_s = self._lease.idle.pause_s
        looked_at, used_s = time.monotonic(), self._lease.cpu_seconds()
        while True:
            now = time.monotonic()
            since = self._door.idle_since()
            idle_s = 0.0 if since is None else now - since
            if self._now.is_set():
                if since is not None:
                    return
                await asyncio.sleep(SOON_S)
                continue
            before = looked_at, used_s
            looked_at, used_s = now, self._lease.cpu_seconds()
            if pause_s and idle_s >= pause_s:
                # Work of a background thread or process of the user's is not stopped.
                if used_s - before[1] <= WORKING_CPUS * (now - before[0]):
                    return
                idle_s = 0.0
            try:
                async with asyncio.timeout(self._look_again_s(pause_s - idle_s)):
                    await self._now.wait()
            except TimeoutError:
                continue

    def _look_again_s(self, left_s: float) -> float | None:
        return max(left_s, 0.05) if self._lease.idle.pause_s else None
