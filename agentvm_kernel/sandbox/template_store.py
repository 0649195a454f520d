"""The templates on this host: which one fits, which are damaged or left behind. `templates` builds them.

The kernel process imports this module before anything else, so it imports little.
"""

from collections.abc import Collection

from agentvm_kernel.errors import SnapshotError
from agentvm_kernel.hypervisor import accelerator, mechanism
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.memory import sources
from agentvm_kernel.hypervisor.snapshot import Snapshot, differences, list_all
from agentvm_kernel.image.runtime import runtime_digest
from agentvm_kernel.image.store import Image
from agentvm_kernel.log import get_logger
from agentvm_kernel.transport.host import vsock_available

log = get_logger(__name__)

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


def find_sound(hypervisor: Hypervisor, image: Image, profile: str, without: Collection[str] = ()) -> Snapshot | None:
    """Return a template whose files are what was frozen; those that are not are deleted on the way."""
    damaged = set(without)
    while (snapshot := find(hypervisor, image, profile, without=damaged)) is not None:
        try:
            sources(hypervisor, snapshot)
            return snapshot
        except (SnapshotError, FileNotFoundError) as error:
            log.warning("template_damaged", template=snapshot.id, error=str(error))
            damaged.add(snapshot.id)
            discard(snapshot)
    return None


def remove_outdated(hypervisor: Hypervisor, new: Snapshot) -> None:
    """Delete templates that an update has left behind: long unusable, for the same profile, and nothing rests on them."""
    everything = list_all()
    parents = {snapshot.parent for snapshot in everything}
    for old in everything:
        same = old.is_template and old.hardware.profile == new.hardware.profile and old.id not in parents
        if same and new.created - old.created > OUTDATED_S and obstacles(hypervisor, old):
            discard(old)


def discard(template: Snapshot) -> None:
    """Delete a template that nobody may use any more; where machines or snapshots still rest on it, a newer one comes before it."""
    from agentvm_kernel.hypervisor.garbage import delete

    try:
        delete(template)
    except SnapshotError as error:
        log.warning("template_not_deleted", template=template.id, error=str(error))
    except FileNotFoundError:
        log.debug("template_deleted_already", template=template.id)
