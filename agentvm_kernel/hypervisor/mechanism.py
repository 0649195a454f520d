"""How machines are frozen and thawed on this host.

"pass-through": QEMU's memory lies in files of ours and its monitor saves and loads devices, both through libvirt's QEMU namespace
(`freeze`, `thaw`). Where that is refused, by libvirt's access rules, by AppArmor or SELinux (which know nothing of such files) or by QEMU:
"internal", libvirt's snapshots inside the disk image (`internal`), several times slower.

Which of the two works is tried once with an empty machine and remembered. The kernel process imports this module.
"""

import json
import os
import time
import uuid
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from agentvm_kernel.errors import AgentVMError, ConfigError, MachineTimeout
from agentvm_kernel.hypervisor import accelerator
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import MachineFiles, write_atomically, write_private
from agentvm_kernel.hypervisor.states import Hardware
from agentvm_kernel.hypervisor.tags import Owner, Tags
from agentvm_kernel.log import get_logger
from agentvm_kernel.paths import state_dir

if TYPE_CHECKING:
    from agentvm_kernel.hypervisor.machine import Machine

log = get_logger(__name__)

VARIABLE = "AGENTVM_FREEZE"
Kind = Literal["pass-through", "internal"]
REFUSED_S = 24 * 3600.0
"""A refusal is believed for so long, in seconds: the host's owner may lift it. `agentvm doctor` asks at once."""
PROBE_MIB = 16


@dataclass(frozen=True, slots=True)
class Mechanism:
    """How machines are frozen and thawed.

    Attributes:
        kind: "pass-through" or "internal".
        reason: one sentence for people that says why.
    """

    kind: Kind
    reason: str


def known(hypervisor: Hypervisor) -> Mechanism | None:
    """Return what the user has set or an earlier probe has found; None where nobody knows yet.

    Raises:
        ConfigError: AGENTVM_FREEZE is none of "auto", "pass-through" and "internal".
    """
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in ("auto", "pass-through", "internal"):
        raise ConfigError(f"{VARIABLE} is {wanted!r}.", hint="It can be auto, pass-through or internal.")
    if wanted != "auto":
        return Mechanism(cast(Kind, wanted), f"as {VARIABLE} asks for")
    try:
        record = json.loads(_record().read_bytes())
        if record["host"] != _host(hypervisor) or record["kind"] not in ("pass-through", "internal"):
            return None
        if record["kind"] == "internal" and not 0 <= time.time() - record["at"] < REFUSED_S:
            return None
        return Mechanism(record["kind"], str(record["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def choose(hypervisor: Hypervisor) -> Mechanism:
    """Return what is known, and find it out where nothing is."""
    return known(hypervisor) or probe(hypervisor)


def probe(hypervisor: Hypervisor) -> Mechanism:
    """Freeze and thaw an empty machine by pass-through, remember whether that worked and return it. It takes a second.

    Raises:
        AgentVMError: no machine can be started at all, pass-through or not.
        OSError: the disk is full.
    """
    try:
        _try_pass_through(hypervisor)
        found = Mechanism("pass-through", "QEMU's memory files and its monitor can be used")
    except AgentVMError as error:
        # What fails without pass-through as well is another matter, and so is what a loaded host does not do in time.
        if isinstance(error, MachineTimeout):
            raise
        _try_plain(hypervisor)
        found = Mechanism("internal", f"pass-through to QEMU is refused: {error}")
    log.info("freeze_mechanism", kind=found.kind, reason=found.reason)
    record = {"host": _host(hypervisor), "at": time.time(), **asdict(found)}
    write_atomically(_record(), json.dumps(record, indent=1).encode())
    return found


def _record() -> Path:
    return state_dir() / "mechanism.json"


def _host(hypervisor: Hypervisor) -> list[object]:
    """Return what the answer depends on."""
    with hypervisor.errors("asking for libvirt's version"):
        libvirt_version = int(hypervisor.connection().getLibVersion())
    return [hypervisor.uri, libvirt_version, list(hypervisor.qemu_version)]


def _try_pass_through(hypervisor: Hypervisor) -> None:
    """Do all that pass-through needs, in miniature.

    Raises:
        AgentVMError: something of it is refused.
    """
    from agentvm_kernel.hypervisor.domain_xml import memory_arguments
    from agentvm_kernel.hypervisor.freeze import save_devices
    from agentvm_kernel.hypervisor.thaw import INCOMING_ARGUMENTS, load_devices

    frozen = _empty_machine(hypervisor)
    try:
        memory = frozen.files.memory
        write_private(memory, b"", user=hypervisor.qemu_user)
        os.truncate(memory, PROBE_MIB << 20)
        frozen.start(_empty_xml(frozen, memory_arguments(memory, PROBE_MIB, shared=True)), paused=True)
        state = save_devices(frozen)
        frozen.stop()
        thawed = _empty_machine(hypervisor)
        try:
            arguments = [*memory_arguments(memory, PROBE_MIB, shared=False), *INCOMING_ARGUMENTS]
            thawed.start(_empty_xml(thawed, arguments), paused=True)
            load_devices(thawed, state)
        finally:
            thawed.destroy()
    finally:
        frozen.destroy()


def _try_plain(hypervisor: Hypervisor) -> None:
    machine = _empty_machine(hypervisor)
    try:
        machine.start(_empty_xml(machine, None), paused=True)
    finally:
        machine.destroy()


def _empty_machine(hypervisor: Hypervisor) -> "Machine":
    from agentvm_kernel.hypervisor.machine import Machine

    files = MachineFiles.of(f"agentvm-probe-{os.urandom(4).hex()}")
    files.claim()
    hardware = Hardware(
        profile="probe",
        vcpus=1,
        memory_mib=PROBE_MIB,
        disk_gib=0,
        cpu_quota_percent=100,
        accelerator=accelerator.choose().kind,
        image="",
        runtime="",
        vsock=False,
    )
    tags = Tags(owner=Owner.current(), folder=files.folder, profile="probe", state="probe")
    machine = Machine(hypervisor, files, uuid=str(uuid.uuid4()), hardware=hardware, tags=tags, secret=b"")
    try:
        files.prepare(hypervisor.qemu_user, machine.record())
    except BaseException:
        files.remove()
        raise
    return machine


def _empty_xml(machine: "Machine", arguments: list[str] | None) -> str:
    """Return the XML of a machine without disk and kernel; None for `arguments` does without pass-through."""
    from agentvm_kernel.hypervisor.domain_xml import CPU_MODES, MACHINE_TYPE, QEMU_NAMESPACE, add_dac_label

    kind = machine.hardware.accelerator
    domain = ElementTree.Element("domain", type="kvm" if kind == "kvm" else "qemu")
    ElementTree.SubElement(domain, "name").text = machine.name
    ElementTree.SubElement(domain, "uuid").text = machine.uuid
    ElementTree.SubElement(domain, "metadata").append(machine.tags.to_element())
    ElementTree.SubElement(domain, "memory", unit="MiB").text = str(PROBE_MIB)
    ElementTree.SubElement(ElementTree.SubElement(domain, "os"), "type", machine=MACHINE_TYPE).text = "hvm"
    ElementTree.SubElement(domain, "cpu", mode=CPU_MODES[kind])
    devices = ElementTree.SubElement(domain, "devices")
    ElementTree.SubElement(devices, "controller", type="usb", model="none")
    ElementTree.SubElement(devices, "memballoon", model="none")
    add_dac_label(domain, machine.hypervisor.dac_user)
    if arguments is not None:
        commandline = ElementTree.SubElement(domain, f"{{{QEMU_NAMESPACE}}}commandline")
        for argument in ["-pidfile", str(machine.files.pid_file), *arguments]:
            ElementTree.SubElement(commandline, f"{{{QEMU_NAMESPACE}}}arg", value=argument)
    return ElementTree.tostring(domain, encoding="unicode")
