"""Freezing and thawing by libvirt's internal snapshots, for hosts where pass-through is refused (see `mechanism`).

An internal snapshot lies in the machine's disk image: memory, devices and disk of one moment (QEMU's `savevm`). The image becomes a disk
layer of ours as it is, and the machine moves on to an empty one on top. To thaw it, the image is copied for the new machine (blocks are
shared where the file system can) and libvirt starts that machine from the snapshot in it. All of the memory is written and read each time,
and no page is shared between machines: that is what makes it slow. The kernel process imports this module where it is needed.

Only libvirt's stable interface is used: https://libvirt.org/formatsnapshot.html, virDomainSnapshotCreateXML, virDomainRevertToSnapshot.
"""

import contextlib
import os
import time
import uuid
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import libvirt

from agentvm_kernel.errors import MachineLost
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import MachineFiles, give, write_private
from agentvm_kernel.hypervisor.freeze import finish, move_disk, prepare_overlay, write_common
from agentvm_kernel.hypervisor.machine import Machine, new_name
from agentvm_kernel.hypervisor.memory import content_digest, seal, sources
from agentvm_kernel.hypervisor.pages import copy_sparse
from agentvm_kernel.hypervisor.snapshot import Snapshot, being_made, layer_path, new_id
from agentvm_kernel.hypervisor.states import MachineState
from agentvm_kernel.hypervisor.tags import Owner, Tags
from agentvm_kernel.hypervisor.thaw import own_xml
from agentvm_kernel.log import get_logger

log = get_logger(__name__)

NAME = "agentvm"
"""Of the snapshot within its image."""


def freeze_template(machine: Machine) -> Snapshot:
    """Make a template of a cold-booted machine and destroy the machine (see `freeze.freeze_template`)."""
    snapshot_id, layer = new_id(), new_id()
    with being_made(snapshot_id) as folder:
        began = time.monotonic()
        machine.pause()
        _save(machine)
        pause_s = time.monotonic() - began
        common = write_common(machine, folder)
        machine.stop()
        os.link(machine.overlay, layer_path(layer))
        seal(machine.hypervisor, layer_path(layer), 0o444)
        machine.overlay.unlink()
        snapshot = _recorded(folder, snapshot_id, layer, name="", description="", pause_s=pause_s, **common)
    machine.destroy()
    return snapshot


def freeze_live(machine: Machine, *, name: str, description: str, resume: bool, **about: str | bool) -> Snapshot:
    """Make a snapshot of a machine thawed by `thaw`, which then runs on (see `freeze.freeze_live`)."""
    snapshot_id, layer = new_id(), new_id()
    with being_made(snapshot_id) as folder:
        next_overlay = prepare_overlay(machine, layer)
        was_running = machine.state is MachineState.RUNNING
        began = time.monotonic()
        if was_running:
            machine.pause()
        try:
            _save(machine)
            move_disk(machine, next_overlay, layer_path(layer))
        finally:
            if was_running and resume:
                machine.resume()
        pause_s = time.monotonic() - began
        owner = Owner.current()
        fields = {
            "name": name,
            "description": description,
            "pause_s": pause_s,
            "owner_pid": owner.pid,
            "owner_start": owner.start,
            **write_common(machine, folder),
            **about,
        }
        snapshot = _recorded(folder, snapshot_id, layer, **fields)
    log.debug("machine_frozen_inside", machine=machine.name, snapshot=snapshot_id, pause_ms=round(pause_s * 1000))
    return snapshot


def thaw(hypervisor: Hypervisor, snapshot: Snapshot, *, name: str | None, state: str, lease: str) -> Machine:
    """Return a new, paused machine that is where the snapshot's was (see `thaw.thaw`)."""
    sources(hypervisor, snapshot)
    files = MachineFiles.of(name or new_name())
    tags = Tags(
        owner=Owner.current(),
        folder=files.folder,
        lease=lease,
        template=snapshot.id,
        state=state,
        profile=snapshot.hardware.profile,
    )
    secret = snapshot.secret.read_bytes()
    files.claim()
    machine = Machine(hypervisor, files, uuid=str(uuid.uuid4()), hardware=snapshot.hardware, tags=tags, secret=secret)
    try:
        began = time.monotonic()
        files.prepare(hypervisor.qemu_user, machine.record())
        write_private(files.secret, secret)
        copy_sparse(snapshot.disk, files.overlay)
        give(files.overlay, hypervisor.qemu_user)
        xml = ElementTree.tostring(own_xml(snapshot, machine), encoding="unicode")
        copied = time.monotonic()
        machine.start_by(lambda connection: _start(connection, machine, xml), paused=True)
        note_pid(machine)
        machine.set_limits()
        log.debug(
            "machine_thawed_inside",
            machine=machine.name,
            snapshot=snapshot.id,
            copy_ms=round((copied - began) * 1000),
            start_ms=round((time.monotonic() - copied) * 1000),
        )
    except BaseException:
        machine.destroy()
        raise
    return machine


def note_pid(machine: Machine) -> None:
    """Write QEMU's process id to the file that a `-pidfile` of ours would have made.

    Raises:
        MachineLost: it has no QEMU.
    """
    wanted = f"\0guest={machine.name},".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "cmdline").read_bytes():
                write_private(machine.files.pid_file, folder.name.encode())
                return
    raise MachineLost(f"Machine {machine.name} has no QEMU process.")


def _save(machine: Machine) -> None:
    """Put memory, devices and disk of the paused machine into its disk image, as an internal snapshot that only the image knows of."""
    snapshot = ElementTree.Element("domainsnapshot")
    ElementTree.SubElement(snapshot, "name").text = NAME
    with machine.hypervisor.errors(f"saving machine {machine.name} in its disk"):
        machine.domain.snapshotCreateXML(
            ElementTree.tostring(snapshot, encoding="unicode"), libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        )


def _recorded(folder: Path, snapshot_id: str, layer: str, **fields: Any) -> Snapshot:
    """Write the metadata of a snapshot whose state is in its disk layer, and return it."""
    os.link(layer_path(layer), folder / "state")
    digests = {"state": content_digest(folder / "state")}
    snapshot = Snapshot(id=snapshot_id, layer=layer, parent="", pages=0, internal=True, digests=digests, **fields)
    finish(snapshot, folder)
    return snapshot


def _start(connection: Any, machine: Machine, xml: str) -> Any:
    """Start the machine from the snapshot in its image, paused, and return the domain.

    libvirt reverts only domains that it keeps, to snapshots that it knows: so both are made known to it, and forgotten at once when the
    machine is there, which makes it one like all others of ours. Who dies in between leaves a domain for the reaper.
    """
    domain = connection.defineXML(xml)
    try:
        snapshot = domain.snapshotCreateXML(_known_snapshot(xml), libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE)
        domain.revertToSnapshot(snapshot, libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED)
        # The next snapshot writes its memory over this one's then, and not beside it.
        snapshot.delete(0)
    finally:
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
    return domain


def _known_snapshot(xml: str) -> str:
    """Return the description of the snapshot in the image of the domain that `xml` describes."""
    snapshot = ElementTree.Element("domainsnapshot")
    for tag, text in (("name", NAME), ("state", "paused"), ("creationTime", str(int(time.time())))):
        ElementTree.SubElement(snapshot, tag).text = text
    ElementTree.SubElement(snapshot, "memory", snapshot="internal")
    disks = ElementTree.SubElement(snapshot, "disks")
    ElementTree.SubElement(disks, "disk", name="vda", snapshot="internal")
    snapshot.append(ElementTree.fromstring(xml))  # noqa: S314 (our own words)
    return ElementTree.tostring(snapshot, encoding="unicode")
