"""`%vm` and `%pool`."""

from agentvm_kernel.jupyter.magics.arguments import HostMagic

MAGICS: tuple[HostMagic, ...] = ()
