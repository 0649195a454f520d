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
from agentvm_kernel.hypervisor import accelerator, mechanism
from agentvm_kernel.hypervisor.boot import boot_machine
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.freeze import freeze_template
from agentvm_kernel.hypervisor.machine import Machine
from agentvm_kernel.hypervisor.memory import sources
from agentvm_kernel.hypervisor.snapshot import Snapshot, differences, list_all
from agentvm_kernel.image.initramfs import runtime_digest
from agentvm_kernel.image.store import Image
from agentvm_kernel.log import get_logger
from agentvm_kernel.transport.connection import open_connection
from agentvm_kernel.transport.host import vsock_available

log = get_logger(__name__)

Progress = Callable[[str], None]
Made = TypeVar("Made")
CONSOLE_LINES = 20
OUTDATED_S = 7 * 86400.0
"""An unusable template that is younger may be another checkout's, or one to go back to."""


def find(hypervisor: Hypervisor, image: Image, profile: str, *, without: Collection[str] = ()) -> Snapshot | None:
    """Return the newest template for this image and profile on this host, None where it has to be built. Blocks.

    Args:
        hypervisor: whose QEMU shall thaw it.
        image: that it is a boot of.
        profile: name of its resource profile.
        without: ids of templates that turned out to be unusable.
    """
    for snapshot in reversed(list_all()):
        wanted = (image.digest, profile) == (snapshot.hardware.image, snapshot.hardware.profile)
        if snapshot.is_template and wanted and snapshot.id not in without and not obstacles(hypervisor, snapshot):
            return snapshot
    return None


def obstacles(hypervisor: Hypervisor, template: Snapshot) -> list[str]:
    """Return in words why no more machines are thawed from a template; empty when it may be used."""
    hardware, found = template.hardware, []
    if hardware.runtime != runtime_digest():
        found.append("the guest runtime in it is another version")
    if hardware.accelerator != (here := accelerator.choose().kind):
        found.append(f"it is for {hardware.accelerator}, here is {here}")
    if hardware.vsock != vsock_available():
        found.append(f"it has {'a' if hardware.vsock else 'no'} vsock")
    way = mechanism.known(hypervisor)
    if way is not None and template.internal != (way.kind == "internal"):
        found.append(f"machines are thawed in the other way here: {way.reason}")
    return found or differences(hypervisor, template)


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
    if (ready := await asyncio.to_thread(_find_sound, hypervisor, image, profile, without)) is not None:
        return ready
    on_progress("Waiting for another process that builds the template")
    async with _locked():
        if (ready := await asyncio.to_thread(_find_sound, hypervisor, image, profile, without)) is not None:
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
        await asyncio.to_thread(_remove_outdated, hypervisor, made)
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
    await asyncio.to_thread(_discard, template)
    template = await ensure(
        hypervisor, image, profile, timeout_s=timeout_s, on_progress=on_progress, without={template.id}
    )
    return await thaw(template)


def _find_sound(hypervisor: Hypervisor, image: Image, profile: str, without: Collection[str]) -> Snapshot | None:
    """Return a template whose files are what was frozen; those that are not are deleted on the way."""
    damaged = set(without)
    while (snapshot := find(hypervisor, image, profile, without=damaged)) is not None:
        try:
            sources(hypervisor, snapshot)
            return snapshot
        except (SnapshotError, FileNotFoundError) as error:
            log.warning("template_damaged", template=snapshot.id, error=str(error))
            damaged.add(snapshot.id)
            _discard(snapshot)
    return None


def _remove_outdated(hypervisor: Hypervisor, new: Snapshot) -> None:
    """Delete templates that an update has left behind: long unusable, for the same profile, and nothing rests on them."""
    everything = list_all()
    parents = {snapshot.parent for snapshot in everything}
    for old in everything:
        same = old.is_template and old.hardware.profile == new.hardware.profile and old.id not in parents
        if same and new.created - old.created > OUTDATED_S and obstacles(hypervisor, old):
            _discard(old)


def _discard(template: Snapshot) -> None:
    """Delete a template that nobody may use any more; where machines or snapshots still rest on it, a newer one comes before it."""
    from agentvm_kernel.hypervisor.garbage import delete

    try:
        delete(template)
    except SnapshotError as error:
        log.warning("template_not_deleted", template=template.id, error=str(error))
    except FileNotFoundError:
        log.debug("template_deleted_already", template=template.id)


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
