"""Machines for the kernel process: leases from `sandbox`, with the user's settings. Imports nothing heavy."""

import os

from agentvm_kernel.jupyter.backend import Lease, OnProgress
from agentvm_kernel.sandbox.head_start import HeadStart
from agentvm_kernel.sandbox.lease import acquire
from agentvm_kernel.sandbox.settings import CellLimits, load_settings


class MachineBackend:
    """Leases virtual machines as the configuration says; it is read anew for every machine.

    Args:
        head_start: may have the first machine already.
    """

    def __init__(self, head_start: HeadStart | None = None) -> None:
        self._head_start = head_start

    async def acquire(self, on_progress: OnProgress) -> Lease:
        """Lease a machine, fresh or in the state of the snapshot that this kernel was told to start from. Raises AgentVMError."""
        settings = load_settings()
        if start := os.environ.get("AGENTVM_FROM"):
            from agentvm_kernel.sandbox.snapshot_store import start_from

            return await start_from(start, settings)
        head_start, self._head_start = self._head_start, None
        return await acquire(settings, on_progress=on_progress, head_start=head_start)

    def cell_limits(self) -> CellLimits:
        """Return what a cell may use up. Raises ConfigError."""
        return load_settings().cells
