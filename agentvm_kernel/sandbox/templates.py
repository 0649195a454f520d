"""Templates: the snapshots of freshly booted machines that all others are thawed from. Built on first need, once, by whoever comes first.

A template fits one image, one profile, one guest runtime, one QEMU and one CPU model; for anything else another one is built. It belongs to
one user, since the machines thawed from it share its memory (HAZARDS 7). The kernel process imports this module.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import TypeVar

from agentvm_kernel import paths
from agentvm_kernel.errors import AgentVMError, AuthenticationError, BootError, SnapshotError
from agentvm_kernel.hypervisor.boot import boot_machine
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.freeze import freeze_template
from agentvm_kernel.hypervisor.machine import Machine
from agentvm_kernel.hypervisor.snapshot import Snapshot
from agentvm_kernel.image.store import Image
from agentvm_kernel.log import get_logger
from agentvm_kernel.sandbox.template_store import discard, find, find_sound, obstacles, remove_outdated
from agentvm_kernel.transport.connection import open_connection

__all__ = ["ensure", "explain_boot", "find", "obstacles", "settle", "use"]

log = get_logger(__name__)

Progress = Callable[[str], None]
Made = TypeVar("Made")
CONSOLE_LINES = 20


async def ensure(
    hypervisor: Hypervisor,
    image: Image,
    profile: str,
    *,
    timeout_s: float,
    on_progress: Progress = lambda text: None,
    without: Collection[str] = (),
) -> Snapshot:
    """Return the template for this image and profile, built unless it is there and undamaged. Several processes that want it build it once.

    Args:
        hypervisor: where.
        image: what to boot.
        profile: name of the resource profile.
        timeout_s: how long the guest may take to boot.
        on_progress: called with a short sentence at each stage.
        without: ids of templates that turned out to be unusable.

    Raises:
        AgentVMError: it cannot be built; the message says why.
    """
    if (ready := await asyncio.to_thread(find_sound, hypervisor, image, profile, without)) is not None:
        return ready
    on_progress("Waiting for another process that builds the template")
    async with _locked():
        if (ready := await asyncio.to_thread(find_sound, hypervisor, image, profile, without)) is not None:
            return ready
        on_progress("Booting a machine to make a template of, which is done once")
        machine = await asyncio.to_thread(boot_machine, hypervisor, image, profile, template=True)
        try:
            await settle(machine, timeout_s=timeout_s, on_progress=on_progress)
            on_progress("Freezing the template")
            made = await asyncio.to_thread(freeze_template, machine)
        except BaseException as error:
            explained = await asyncio.to_thread(explain_boot, machine, error)
            await asyncio.to_thread(machine.release)
            raise explained from error
        await asyncio.to_thread(remove_outdated, hypervisor, made)
        return made


async def use(
    hypervisor: Hypervisor,
    image: Image,
    profile: str,
    thaw: Callable[[Snapshot], Awaitable[Made]],
    *,
    timeout_s: float,
    on_progress: Progress = lambda text: None,
) -> Made:
    """Return what `thaw` makes of the template for this image and profile. One that QEMU cannot load is deleted and built anew, once.

    Args:
        hypervisor: where.
        image: what to boot.
        profile: name of the resource profile.
        thaw: given the template; raises SnapshotError where that cannot be thawed.
        timeout_s: how long the guest may take to boot.
        on_progress: called with a short sentence at each stage.

    Raises:
        AgentVMError: there is no template to be had, or `thaw` failed.
    """
    template = await ensure(hypervisor, image, profile, timeout_s=timeout_s, on_progress=on_progress)
    try:
        return await thaw(template)
    except (SnapshotError, AuthenticationError, FileNotFoundError) as error:
        # AuthenticationError: what is thawed does not know the secret that lies beside the template.
        log.warning("template_unusable", template=template.id, error=str(error))
    on_progress("Building the template anew, since the old one is damaged")
    await asyncio.to_thread(discard, template)
    template = await ensure(
        hypervisor, image, profile, timeout_s=timeout_s, on_progress=on_progress, without={template.id}
    )
    return await thaw(template)


async def settle(machine: Machine, *, timeout_s: float, on_progress: Progress = lambda text: None) -> None:
    """Wait until a machine's Python kernel is ready and the guest stands at a clean boundary, with no host connected.

    Raises:
        AgentVMError: it does not get there.
    """
    connection = await open_connection(machine.address, machine.secret, timeout_s=timeout_s)
    try:
        on_progress("Waiting for the Python kernel in the machine")
        state = await connection.call("kernel.wait", timeout_s=timeout_s)
        for module, problem in state.get("failed_preload", {}).items():
            log.warning("preload_failed", module=str(module)[:100], problem=str(problem)[:300])
        on_progress("Warming the Python kernel up")
        warm_up = {"everything": True, "timeout_s": timeout_s}
        await connection.call("kernel.warm_up", warm_up, timeout_s=timeout_s)
        await connection.call("quiesce", timeout_s=timeout_s)
    finally:
        await connection.close()


def explain_boot(machine: Machine, error: BaseException) -> BaseException:
    """Return an error that shows the end of the serial log where the guest did not come up. Blocks."""
    if not isinstance(error, AgentVMError):
        return error
    tail = machine.console_tail(CONSOLE_LINES)
    return BootError(
        f"Machine {machine.name} did not come up: {error.message}",
        hint=f"The end of its serial log:\n{tail}" if tail else error.hint,
    )


@contextlib.asynccontextmanager
async def _locked() -> AsyncIterator[None]:
    descriptor = os.open(paths.state_dir() / "template.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        await asyncio.to_thread(fcntl.flock, descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
