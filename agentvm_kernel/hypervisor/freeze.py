"""Freezing: a machine becomes a snapshot.

The devices' state comes from QEMU's `xen-save-devices-state`, which despite its name has nothing to do with Xen: it saves all but the
memory. The memory of a template already is a file. That of a thawed machine is its parent's file plus the pages that the guest has written
since; only those are copied. The disk moves on to a new layer in the same pause, so memory and disk are of one moment.

Before either, the caller brings the guest to a clean boundary (no cell running, host side of the connection closed): thawed machines wake
up there. The kernel process imports this module.
"""

import os
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import libvirt

from agentvm_kernel.errors import SnapshotError
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import give, read_untrusted, write_private
from agentvm_kernel.hypervisor.machine import Machine
from agentvm_kernel.hypervisor.memory import content_digest, memory_mode, seal, sources, stamp
from agentvm_kernel.hypervisor.pages import Capture, find_mappings, write_changes
from agentvm_kernel.hypervisor.qcow2 import create_overlay
from agentvm_kernel.hypervisor.snapshot import (
    Snapshot,
    being_made,
    layer_path,
    load,
    new_id,
    version_text,
)
from agentvm_kernel.hypervisor.states import MachineState
from agentvm_kernel.hypervisor.tags import Owner
from agentvm_kernel.log import get_logger

log = get_logger(__name__)

MAX_STATE = 64 << 20
"""More than any device state of ours; QEMU is not trusted to fill the host's memory."""
DISK = "vda"
MAX_DELTAS = 16
"""So many deltas may lie on top of a memory file."""


def freeze_template(machine: Machine) -> Snapshot:
    """Make a template of a cold-booted machine and destroy the machine.

    Args:
        machine: booted by `boot_machine(..., template=True)`, its runtime waiting for a host.

    Raises:
        SnapshotError: it was not booted to become a template.
        IllegalTransition: it does not run.
    """
    files = machine.files
    if not files.memory.exists() and machine.tags.state == "template":
        from agentvm_kernel.hypervisor import internal

        return internal.freeze_template(machine)
    if not files.memory.exists():
        raise SnapshotError(
            f"The memory of machine {machine.name} is not in a file.", hint="Boot it with template=True."
        )
    snapshot_id, layer = new_id(), new_id()
    with being_made(snapshot_id) as folder:
        began = time.monotonic()
        machine.pause()
        state = save_devices(machine)
        pause_s = time.monotonic() - began
        common = write_common(machine, folder)
        write_private(folder / "state", state, mode=0o400)
        machine.stop()
        os.link(machine.overlay, layer_path(layer))
        seal(machine.hypervisor, layer_path(layer), 0o444)
        files.memory.rename(folder / "memory")
        seal(machine.hypervisor, folder / "memory", memory_mode(machine.hypervisor))
        snapshot = Snapshot(
            id=snapshot_id,
            name="",
            description="",
            parent="",
            layer=layer,
            pages=0,
            pause_s=pause_s,
            digests={"state": content_digest(folder / "state"), "memory": content_digest(folder / "memory")},
            **common,
        )
        finish(snapshot, folder)
    machine.destroy()
    return snapshot


def freeze_live(
    machine: Machine, *, name: str = "", description: str = "", resume: bool = True, **about: str | bool
) -> Snapshot:
    """Make a snapshot of a thawed machine, which then runs on.

    Only the difference to its parent is written; `snapshot.ensure_memory` builds the memory file, best before somebody waits for a thaw.

    Args:
        machine: running or paused, and thawed from a snapshot.
        name: of the snapshot.
        description: of the snapshot.
        resume: let the machine run on; a machine that was paused stays paused.
        about: fields of `Snapshot` that say whose it is: session, after, automatic.

    Raises:
        SnapshotError: it was not thawed from a snapshot, or its memory cannot be read.
    """
    if not machine.tags.template:
        raise SnapshotError(
            f"Machine {machine.name} was booted and not thawed, so it cannot be frozen.",
            hint="Thaw one from a template and freeze that.",
        )
    base = load(machine.memory_of)
    if base.internal:
        from agentvm_kernel.hypervisor import internal

        return internal.freeze_live(machine, name=name, description=description, resume=resume, **about)
    snapshot_id, layer = new_id(), new_id()
    with being_made(snapshot_id) as folder:
        pid = machine.qemu_pid
        capture = Capture(pid, find_mappings(pid, base.memory), folder / "spill")
        try:
            next_overlay = prepare_overlay(machine, layer)
            began = time.monotonic()
            state = _stand_still(machine, capture, lambda: move_disk(machine, next_overlay, layer_path(layer)), resume)
            pause_s = time.monotonic() - began
            parent, deltas = _parent(machine.hypervisor, str(about.get("after") or machine.tags.template), base)
            pages = write_changes(folder / "delta", capture, base.memory, [one.delta for one in deltas])
        finally:
            capture.close()
            (folder / "spill").unlink(missing_ok=True)
        (folder / "delta").chmod(0o400)
        common = write_common(machine, folder)
        write_private(folder / "state", state, mode=0o400)
        owner = Owner.current()
        snapshot = Snapshot(
            id=snapshot_id,
            name=name,
            description=description,
            parent=parent.id,
            layer=layer,
            pages=pages,
            pause_s=pause_s,
            owner_pid=owner.pid,
            owner_start=owner.start,
            **common,
            **about,  # type: ignore[arg-type]
        )
        finish(snapshot, folder)
    log.debug(
        "machine_frozen",
        machine=machine.name,
        snapshot=snapshot_id,
        pages=pages,
        pause_ms=round(pause_s * 1000),
        rest_ms=round((time.monotonic() - began - pause_s) * 1000),
    )
    return snapshot


def _stand_still(machine: Machine, capture: Capture, switch_disk: Callable[[], None], resume: bool) -> bytes:
    """Pause the machine, take what a snapshot needs of it, and let it run on; return the devices' state."""
    was_running = machine.state is MachineState.RUNNING
    times = [time.monotonic()]
    if was_running:
        machine.pause()
    times.append(time.monotonic())
    try:
        # Copying the pages takes as long as all that QEMU and libvirt have to do, and needs neither.
        with ThreadPoolExecutor(1) as other:
            saving = other.submit(save_devices, machine)
            switching = other.submit(switch_disk)
            capture.take()
            times.append(time.monotonic())
            state = saving.result()
            times.append(time.monotonic())
            switching.result()
            times.append(time.monotonic())
    finally:
        if was_running and resume:
            machine.resume()
    times.append(time.monotonic())
    steps = ("pause", "copy", "devices", "disk", "resume")
    log.debug(
        "machine_stood_still",
        machine=machine.name,
        **{
            f"{step}_ms": round((end - start) * 1000) for step, start, end in zip(steps, times, times[1:], strict=False)
        },
    )
    return state


def _parent(hypervisor: Hypervisor, after: str, base: Snapshot) -> tuple[Snapshot, list[Snapshot]]:
    """Return the snapshot to write a delta against, and what comes on top of the memory of `base` there, newest first.

    What came before in the history has most pages in common, but it must rest on the same memory file. After many of those a delta is
    written against the memory file again, or else each restore would have to look through all of them.
    """
    try:
        before = load(after)
        rests_on, above = sources(hypervisor, before)
        if rests_on.id == base.id and len(above) < MAX_DELTAS:
            return before, above
    except SnapshotError as error:
        log.debug("no_parent", snapshot=after, error=str(error))
    return base, []


def save_devices(machine: Machine) -> bytes:
    """Have QEMU save the state of all devices of the paused machine."""
    path = machine.files.sockets / "state"
    # With live=true a paused QEMU would give up its disks for a receiver to take over, and die of an assertion at the next save.
    machine.qmp("xen-save-devices-state", filename=str(path), live=False)
    try:
        return read_untrusted(path, MAX_STATE)
    finally:
        path.unlink(missing_ok=True)


def prepare_overlay(machine: Machine, layer: str) -> Path:
    """Make the empty image that the machine shall write to when its present one has become a layer (see `move_disk`)."""
    number = int(machine.overlay.stem.rpartition("-")[2] or 0) if "-" in machine.overlay.stem else 0
    overlay = machine.files.folder / f"overlay-{number + 1}.qcow2"
    overlay.unlink(missing_ok=True)
    os.link(machine.overlay, layer_path(layer))
    create_overlay(overlay, machine.overlay, recorded_backing=layer_path(layer))
    give(overlay, machine.hypervisor.qemu_user)
    return overlay


def move_disk(machine: Machine, overlay: Path, layer: Path) -> None:
    """Let the paused machine write to `overlay` from now on; its present one, also known as `layer`, does not change any more.

    It stays so when the rest of the freeze fails: the layer then is just one that no snapshot is named after.
    """
    snapshot = ElementTree.Element("domainsnapshot")
    disk = ElementTree.SubElement(
        ElementTree.SubElement(snapshot, "disks"), "disk", name=DISK, snapshot="external", type="file"
    )
    ElementTree.SubElement(disk, "driver", type="qcow2")
    ElementTree.SubElement(disk, "source", file=str(overlay))
    flags = (
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    )
    with machine.hypervisor.errors(f"giving machine {machine.name} a new disk layer"):
        machine.domain.snapshotCreateXML(ElementTree.tostring(snapshot, encoding="unicode"), flags)
    machine.set_overlay(overlay)
    seal(machine.hypervisor, layer, 0o444)


def write_common(machine: Machine, folder: Path) -> dict[str, Any]:
    """Write the files that all snapshots have, and return the fields that they fill in the same way."""
    hypervisor = machine.hypervisor
    with hypervisor.errors(f"reading the XML of machine {machine.name}"):
        domain = ElementTree.fromstring(machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))  # noqa: S314 (libvirt's own words)
    kind = domain.find("./os/type")
    generalise(domain)
    write_private(folder / "domain.xml", ElementTree.tostring(domain), mode=0o400)
    write_private(folder / "secret", machine.secret, mode=0o400)
    return {
        "created": time.time(),
        "hardware": machine.hardware,
        "qemu": version_text(hypervisor.qemu_version),
        "machine_type": kind.get("machine", "") if kind is not None else "",
        "cpu": hypervisor.cpu_model(machine.hardware.accelerator),
    }


def generalise(domain: ElementTree.Element) -> None:
    """Remove from a domain's XML what belongs to that one machine, or to its cold boot."""
    removable = (
        "metadata",
        "memtune",
        "cputune",
        "resource",
        "seclabel",
        "{http://libvirt.org/schemas/domain/qemu/1.0}commandline",
        "{http://libvirt.org/schemas/domain/qemu/1.0}capabilities",
    )
    for tag in removable:
        for element in domain.findall(tag):
            domain.remove(element)
    for system in domain.iterfind("os"):
        for tag in ("kernel", "initrd", "cmdline"):
            for element in system.findall(tag):
                system.remove(element)
    for disk in domain.iterfind("./devices/disk"):
        for element in disk.findall("backingStore"):
            disk.remove(element)


def finish(snapshot: Snapshot, folder: Path) -> None:
    """Write the metadata; see to it that a template is on the disk before it is there. Others end with their session (see `export`)."""
    write_private(folder / "snapshot.json", snapshot.to_json())
    stamp(folder)
    if snapshot.is_template:
        to_disk(snapshot, folder)


def to_disk(snapshot: Snapshot, folder: Path) -> None:
    """Wait until all that is in a snapshot's folder, and its disk layer, is on the disk."""
    for path in (*folder.iterdir(), snapshot.disk, folder):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
