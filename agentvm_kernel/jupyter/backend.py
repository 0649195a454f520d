"""What the kernel process needs of a machine, as protocols, so that it knows neither libvirt nor how machines are made.

Imports nothing heavy.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from agentvm_kernel.sandbox.settings import CellLimits, IdlePolicy
from agentvm_kernel.transport.connection import GuestConnection

OnProgress = Callable[[str], None]


class Lease(Protocol):
    """A machine of ours, connected, its identity renewed and its Python kernel answering."""

    @property
    def connection(self) -> GuestConnection:
        """The connection to its runtime."""

    @property
    def lost(self) -> "asyncio.Future[str]":
        """Resolves with what happened when the machine or the connection to it is gone."""

    @property
    def description(self) -> str:
        """One line for people: which machine this is."""

    @property
    def idle(self) -> IdlePolicy:
        """What becomes of it while nobody uses it."""

    def cpu_seconds(self) -> float:
        """Return the CPU time that it has used, as the host sees it; 0 once it is gone."""

    async def pause(self) -> None:
        """Stop its CPUs; it keeps its state. Raises AgentVMError."""

    async def resume(self) -> None:
        """Let it go on after `pause`, its clock set. Raises AgentVMError."""

    async def release(self) -> None:
        """Give the machine back without waiting for its end."""


class Backend(Protocol):
    """Where machines come from."""

    def cell_limits(self) -> CellLimits:
        """Return what a cell may use up. Raises ConfigError."""

    async def acquire(self, on_progress: OnProgress) -> Lease:
        """Lease a machine.

        Args:
            on_progress: told each stage in a few words, from any thread.

        Raises:
            AgentVMError: there is none to be had; the message says why and what to do.
        """
