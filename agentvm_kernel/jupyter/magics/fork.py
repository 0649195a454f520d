"""`%%fork`."""

from agentvm_kernel.jupyter.magics.arguments import HostMagic

MAGICS: tuple[HostMagic, ...] = ()
