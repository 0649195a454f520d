"""Machines for the kernel process: leases from `sandbox`, with the user's settings. Imports nothing heavy."""

from agentvm_kernel.jupyter.backend import Lease, OnProgress
from agentvm_kernel.sandbox.lease import acquire
from agentvm_kernel.sandbox.settings import CellLimits, load_settings


class MachineBackend:
    """Leases virtual machines as the configuration says; it is read anew for every machine."""

    async def acquire(self, on_progress: OnProgress) -> Lease:
        """Lease a machine. Raises AgentVMError."""
        return await acquire(load_settings(), on_progress=on_progress)

    def cell_limits(self) -> CellLimits:
        """Return what a cell may use up. Raises ConfigError."""
        return load_settings().cells
