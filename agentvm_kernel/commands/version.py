"""`agentvm version`. Imports nothing heavy before it runs."""

import argparse

NAME = "version"
HELP = "show the versions of agentvm, Python, libvirt and QEMU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""


def execute(options: argparse.Namespace) -> int:
    """Print a version a line; what cannot be asked says why."""
    import platform

    from agentvm_kernel import __version__

    print(f"agentvm  {__version__}")
    print(f"Python   {platform.python_version()}")
    libvirt, qemu = _machines()
    print(f"libvirt  {libvirt}")
    print(f"QEMU     {qemu}")
    return 0


def _machines() -> tuple[str, str]:
    from agentvm_kernel.errors import AgentVMError

    try:
        from agentvm_kernel.hypervisor.connection import Hypervisor
    except ImportError as error:
        return (f"unknown: {error}",) * 2
    from agentvm_kernel.sandbox.settings import load_settings

    try:
        with Hypervisor(load_settings().uri) as hypervisor:
            number = hypervisor.connection().getLibVersion()
            libvirt = f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000} ({hypervisor.uri})"
            try:
                return libvirt, ".".join(map(str, hypervisor.qemu_version))
            except AgentVMError as error:
                return libvirt, f"unknown: {error.message}"
    except AgentVMError as error:
        return (f"unknown: {error.message}",) * 2
