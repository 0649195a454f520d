"""Thawing: a snapshot becomes a machine.

A new QEMU maps a memory file privately, so all machines thawed from it share its pages until they write, and is given the pages that the
snapshot has beyond that file; it loads the devices' state, which we feed through a socket; and it gets an empty overlay on the snapshot's
disk layer. The kernel process imports this module and waits for it, so it imports little and asks libvirt as little as it can.
"""

import json
import socket
import time
import uuid
import xml.etree.ElementTree as ElementTree
from typing import Any

import libvirt

from agentvm_kernel.errors import SnapshotError
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import MachineFiles, give, write_private
from agentvm_kernel.hypervisor.machine import Machine, new_name
from agentvm_kernel.hypervisor.memory import READ_ONLY_SINCE, ensure_memory, sources
from agentvm_kernel.hypervisor.pages import apply_to_process, find_mappings
from agentvm_kernel.hypervisor.qcow2 import create_overlay
from agentvm_kernel.hypervisor.snapshot import Snapshot, require_thawable
from agentvm_kernel.hypervisor.tags import Owner, Tags
from agentvm_kernel.log import get_logger

log = get_logger(__name__)

QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
MEMORY_ID = "agentvm-memory"
LOAD_TIMEOUT_S = 30.0
CPU_QUESTIONS = "cpu-unavailable-features"
"""libvirt's name for what we tell it that QEMU lacks (see `_create`), one of the flags in its capability cache."""
INCOMING_ARGUMENTS = (
    # What xen-save-devices-state writes begins with the devices, not with the configuration section of a migration.
    *("-global", "migration.send-configuration=off"),
    *("-incoming", "defer"),
)


def thaw(
    hypervisor: Hypervisor, snapshot: Snapshot, *, name: str | None = None, state: str = "leased", lease: str = ""
) -> Machine:
    """Return a new machine that is where the snapshot's was, paused: resume it, connect, renew its identity.

    Args:
        hypervisor: where.
        snapshot: what to thaw.
        name: of the machine; None makes one up.
        state: what it is used as (see `Tags`).
        lease: id of the lease.

    Raises:
        SnapshotMismatchError: the snapshot does not fit this host, or was tampered with.
        SnapshotError: it cannot be loaded.
    """
    require_thawable(hypervisor, snapshot)
    if snapshot.internal:
        from agentvm_kernel.hypervisor import internal

        return internal.thaw(hypervisor, snapshot, name=name, state=state, lease=lease)
    if hypervisor.memory_is_closed:
        ensure_memory(hypervisor, snapshot)
    base, above = sources(hypervisor, snapshot)
    files = MachineFiles.of(name or new_name())
    tags = Tags(
        owner=Owner.current(),
        folder=files.folder,
        lease=lease,
        template=snapshot.id,
        state=state,
        profile=snapshot.hardware.profile,
    )
    user = hypervisor.qemu_user
    secret = snapshot.secret.read_bytes()
    files.claim()
    machine = Machine(hypervisor, files, uuid=str(uuid.uuid4()), hardware=snapshot.hardware, tags=tags, secret=secret)
    machine.memory_of = base.id
    try:
        began = time.monotonic()
        files.prepare(user, machine.record())
        write_private(files.secret, secret)
        create_overlay(files.overlay, snapshot.disk)
        give(files.overlay, user)
        domain = _domain_xml(hypervisor, snapshot, machine, str(base.memory))
        prepared = time.monotonic()
        _create(machine, domain)
        created = time.monotonic()
        if above:
            # It has not run yet, so there is no translated code that this could leave stale.
            pid = machine.qemu_pid
            apply_to_process([one.delta for one in above], pid, find_mappings(pid, base.memory))
        filled = time.monotonic()
        load_devices(machine, snapshot.state.read_bytes())
        machine.limits_due = True  # while its host already connects
        log.debug(
            "machine_thawed",
            machine=machine.name,
            snapshot=snapshot.id,
            prepare_ms=round((prepared - began) * 1000),
            create_ms=round((created - prepared) * 1000),
            memory_ms=round((filled - created) * 1000),
            load_ms=round((time.monotonic() - filled) * 1000),
        )
    except PermissionError as error:
        machine.destroy()
        if hypervisor.memory_is_closed:
            raise
        log.info("memory_is_closed", uri=hypervisor.uri, reason=str(error))
        hypervisor.memory_is_closed = True
        return thaw(hypervisor, snapshot, name=name, state=state, lease=lease)
    except BaseException:
        machine.destroy()
        raise
    return machine


def _create(machine: Machine, domain: ElementTree.Element) -> None:
    """Create the domain, paused.

    libvirt asks QEMU for each property of the CPU by itself, some hundred questions, unless it is told that this QEMU cannot name the
    features that it lacks; then it asks for all at once. That is three quarters of the time that a domain takes to start. A libvirt that
    does not know the word gets the XML without it.
    """
    hypervisor = machine.hypervisor
    plain = ElementTree.tostring(domain, encoding="unicode")
    capabilities = ElementTree.SubElement(domain, f"{{{QEMU_NAMESPACE}}}capabilities")
    ElementTree.SubElement(capabilities, f"{{{QEMU_NAMESPACE}}}del", capability=CPU_QUESTIONS)
    quick = ElementTree.tostring(domain, encoding="unicode")

    def create(connection: Any) -> Any:
        if not hypervisor.capabilities_refused:
            try:
                return connection.createXML(quick, libvirt.VIR_DOMAIN_START_PAUSED)
            except libvirt.libvirtError as error:
                if CPU_QUESTIONS not in str(error):
                    raise
                hypervisor.capabilities_refused = True
                log.info("no_capability_override", uri=hypervisor.uri, reason=str(error))
        return connection.createXML(plain, libvirt.VIR_DOMAIN_START_PAUSED)

    machine.start_by(create, paused=True)


def load_devices(machine: Machine, state: bytes) -> None:
    """Feed the devices' state to the waiting QEMU and return when it has loaded it.

    Raises:
        SnapshotError: QEMU cannot load it.
    """
    incoming = machine.files.incoming_socket
    with machine.hypervisor.qmp_events(machine.domain, "MIGRATION") as events:
        machine.qmp("migrate-incoming", uri=f"unix:{incoming}")
        with socket.socket(socket.AF_UNIX) as feed:
            feed.settimeout(LOAD_TIMEOUT_S)
            feed.connect(str(incoming))
            feed.sendall(state)
        last = events.wait_for(lambda event: event.get("status") in ("completed", "failed"), LOAD_TIMEOUT_S)
    if last["status"] != "completed":
        raise SnapshotError(f"QEMU could not load the state of snapshot {machine.tags.template} into {machine.name}.")


def own_xml(snapshot: Snapshot, machine: Machine) -> ElementTree.Element:
    """Return the snapshot's domain XML with the machine's own identity and paths."""
    files = machine.files
    try:
        domain = ElementTree.fromstring(snapshot.domain_xml.read_bytes())  # noqa: S314 (our own file)
    except ElementTree.ParseError as error:
        raise SnapshotError(
            f"The domain XML of snapshot {snapshot.name or snapshot.id} is damaged: {error}."
        ) from error
    _element(domain, "name").text = machine.name
    _element(domain, "uuid").text = machine.uuid
    _element(domain, "genid").text = str(uuid.uuid4())
    ElementTree.SubElement(domain, "metadata").append(machine.tags.to_element())
    _element(domain, "./devices/disk/source").set("file", str(files.overlay))
    for kind in ("serial", "console"):
        for source in domain.iterfind(f"./devices/{kind}/source"):
            source.set("path", str(files.serial_log))
    for source in domain.iterfind("./devices/channel/source"):
        source.set("path", str(files.guest_socket))
    for cid in domain.iterfind("./devices/vsock/cid"):
        cid.attrib.clear()
        cid.set("auto", "yes")
    if (user := machine.hypervisor.dac_user) is not None:
        label = ElementTree.SubElement(domain, "seclabel", type="static", model="dac", relabel="no")
        ElementTree.SubElement(label, "label").text = "+{}:+{}".format(*user)
    return domain


def _domain_xml(hypervisor: Hypervisor, snapshot: Snapshot, machine: Machine, memory: str) -> ElementTree.Element:
    """Return the machine's XML with the memory file and QEMU waiting for the devices' state."""
    files, domain = machine.files, own_xml(snapshot, machine)
    backend: dict[str, object] = {
        "qom-type": "memory-backend-file",
        "id": MEMORY_ID,
        "mem-path": memory,
        "size": snapshot.hardware.memory_mib << 20,
        "share": False,
    }
    if hypervisor.qemu_version >= READ_ONLY_SINCE:
        backend |= {"readonly": True, "rom": "off"}
    arguments = (
        *("-pidfile", str(files.pid_file)),
        *("-object", json.dumps(backend), "-machine", f"memory-backend={MEMORY_ID}"),
        *INCOMING_ARGUMENTS,
    )
    commandline = ElementTree.SubElement(domain, f"{{{QEMU_NAMESPACE}}}commandline")
    for argument in arguments:
        ElementTree.SubElement(commandline, f"{{{QEMU_NAMESPACE}}}arg", value=argument)
    return domain


def _element(domain: ElementTree.Element, path: str) -> ElementTree.Element:
    element = domain.find(path)
    if element is None:
        raise SnapshotError(f"The domain XML of the snapshot has no {path}.")
    return element
