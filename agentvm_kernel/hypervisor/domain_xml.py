"""From what a machine shall be to libvirt's domain XML (https://libvirt.org/formatdomain.html).

Values reach the document only through ElementTree, which quotes them, and only after pydantic has checked them. Imports pydantic, so only
the cold path may import this module; a thaw edits the XML that the snapshot keeps.

What is left out on purpose: graphics, sound, USB, user-mode network (attack surface); the balloon (it breaks file-backed private memory);
a random number device (the runtime is given entropy over the connection before the first cell, and one device less is emulated). CPU quota
and memory limit are set once the domain is there (`Machine.set_limits`): a host without cgroup controllers would refuse the whole domain.
"""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from agentvm_kernel.hypervisor.files import MACHINE_NAME
from agentvm_kernel.hypervisor.profiles import Profile
from agentvm_kernel.hypervisor.tags import Tags

QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
ElementTree.register_namespace("qemu", QEMU_NAMESPACE)

MACHINE_TYPE = "q35"
CPU_MODES = {"kvm": "host-passthrough", "tcg": "maximum"}
CHANNEL_NAME = "org.agentvm.0"
MEMORY_ID = "agentvm-memory"
"""Id of the memory back end. It names the RAM block in the migration stream, so a template and its clones share it."""
CMDLINE = "console=ttyS0 panic=-1 quiet mitigations=off transparent_hugepage=madvise"
"""mitigations=off: what runs in the guest is one user's; the border that counts is the machine's. Huge pages only for those who ask for
them, as numpy does: a clone has each page that it writes to itself, and a snapshot holds it."""
CMDLINES = {"kvm": CMDLINE, "tcg": f"{CMDLINE} norandmaps"}
"""By accelerator. norandmaps: with libraries where they always are, processes share what the emulator has translated of them. All clones of
a template have the same layout anyway."""
TB_CACHE_MIB = 256
"""Room for translated code under emulation; QEMU would take up to 1 GiB per machine."""


def _checked_path(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"{path} is not absolute")
    if any(ord(character) < 32 for character in str(path)):
        raise ValueError(f"{str(path)!r} contains control characters")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_checked_path)]


class DomainSpec(BaseModel):
    """Everything that one domain is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=f"^{MACHINE_NAME.pattern}$", description="Name of the domain.")
    uuid: UUID = Field(description="Its UUID.")
    genid: UUID = Field(description="Generation id: a new one tells the guest that it was cloned.")
    profile: Profile = Field(description="How big it is.")
    accelerator: Literal["kvm", "tcg"] = Field(description="What runs its instructions.")
    kernel: AbsolutePath = Field(description="Linux kernel that QEMU boots directly.")
    initrd: AbsolutePath = Field(description="Initial ramdisk.")
    cmdline: str = Field(default=CMDLINE, pattern=r"^[ -~]*$", description="Kernel command line.")
    disk: AbsolutePath = Field(description="qcow2 overlay.")
    serial_log: AbsolutePath = Field(description="File that the guest's console goes to.")
    guest_socket: AbsolutePath | None = Field(description="Socket of the virtio-serial port; None: a vsock instead.")
    pid_file: AbsolutePath = Field(description="File for QEMU's process id.")
    memory_file: AbsolutePath | None = Field(
        default=None, description="File that becomes the guest's memory (a template)."
    )
    qemu_user: tuple[int, int] | None = Field(
        default=None, description="QEMU's user and group where libvirt sets them."
    )
    pass_through: bool = Field(default=True, description="Use libvirt's QEMU namespace (see `mechanism`).")
    tags: Tags


def build(spec: DomainSpec) -> str:
    """Return the domain XML for `spec`."""
    kvm = spec.accelerator == "kvm"
    domain = ElementTree.Element("domain", type="kvm" if kvm else "qemu")
    _text(domain, "name", spec.name)
    _text(domain, "uuid", str(spec.uuid))
    _text(domain, "genid", str(spec.genid))
    ElementTree.SubElement(domain, "metadata").append(spec.tags.to_element())
    _text(domain, "memory", str(spec.profile.memory_mib), unit="MiB")
    _text(domain, "vcpu", str(spec.profile.vcpus))
    system = ElementTree.SubElement(domain, "os")
    _text(system, "type", "hvm", machine=MACHINE_TYPE)
    _text(system, "kernel", str(spec.kernel))
    _text(system, "initrd", str(spec.initrd))
    _text(system, "cmdline", spec.cmdline)
    features = ElementTree.SubElement(domain, "features")
    ElementTree.SubElement(features, "acpi")
    ElementTree.SubElement(features, "apic")
    if not kvm:
        _text(ElementTree.SubElement(features, "tcg"), "tb-cache", str(TB_CACHE_MIB), unit="MiB")
    ElementTree.SubElement(domain, "cpu", mode=CPU_MODES[spec.accelerator])
    clock = ElementTree.SubElement(domain, "clock", offset="utc")
    ElementTree.SubElement(clock, "timer", name="hpet", present="no")
    # A guest that reboots has lost its kernel process and its connection, so a reboot (a panic is one, panic=-1) ends the machine.
    for event in ("on_poweroff", "on_reboot", "on_crash"):
        _text(domain, event, "destroy")
    _add_devices(domain, spec)
    add_dac_label(domain, spec.qemu_user)
    if not spec.pass_through:
        return ElementTree.tostring(domain, encoding="unicode")
    arguments = ["-pidfile", str(spec.pid_file)]
    if spec.memory_file is not None:
        arguments += memory_arguments(spec.memory_file, spec.profile.memory_mib, shared=True)
    commandline = ElementTree.SubElement(domain, f"{{{QEMU_NAMESPACE}}}commandline")
    for argument in arguments:
        ElementTree.SubElement(commandline, f"{{{QEMU_NAMESPACE}}}arg", value=argument)
    return ElementTree.tostring(domain, encoding="unicode")


def add_dac_label(domain: ElementTree.Element, qemu_user: tuple[int, int] | None) -> None:
    """Run QEMU as its user, where libvirt sets one, and let libvirt give that user no files.

    We do so ourselves: libvirt would also make it the owner of shared, immutable disk layers.
    """
    if qemu_user is not None:
        label = ElementTree.SubElement(domain, "seclabel", type="static", model="dac", relabel="no")
        _text(label, "label", "+{}:+{}".format(*qemu_user))


def memory_arguments(path: Path, size_mib: int, *, shared: bool, read_only: bool = False) -> list[str]:
    """Return QEMU's arguments that make a file the guest's memory.

    Args:
        path: of the file.
        size_mib: its size.
        shared: the guest writes into the file; otherwise its writes stay private (copy-on-write).
        read_only: open it read-only, which private mappings can since QEMU 8.2.
    """
    backend: dict[str, object] = {
        "qom-type": "memory-backend-file",
        "id": MEMORY_ID,
        "mem-path": str(path),
        "size": size_mib << 20,
        "share": shared,
    }
    if read_only:
        backend |= {"readonly": True, "rom": "off"}
    return ["-object", json.dumps(backend), "-machine", f"memory-backend={MEMORY_ID}"]


def _add_devices(domain: ElementTree.Element, spec: DomainSpec) -> None:
    devices = ElementTree.SubElement(domain, "devices")
    disk = ElementTree.SubElement(devices, "disk", type="file", device="disk")
    # cache=unsafe: the overlay dies with the machine, so nobody profits from a flush to the host's disk. What a snapshot keeps is synced
    # when it is frozen; QEMU writes its own caches to the file whenever it pauses.
    ElementTree.SubElement(disk, "driver", name="qemu", type="qcow2", cache="unsafe", discard="unmap")
    ElementTree.SubElement(disk, "source", file=str(spec.disk))
    ElementTree.SubElement(disk, "target", dev="vda", bus="virtio")
    # Directly on the root bus: a root port for each device would cost time when QEMU starts and again when the guest scans them.
    _address(disk, 2)
    ElementTree.SubElement(devices, "controller", type="usb", model="none")
    ElementTree.SubElement(devices, "controller", type="pci", index="0", model="pcie-root")
    serial = ElementTree.SubElement(devices, "serial", type="file")
    ElementTree.SubElement(serial, "source", path=str(spec.serial_log), append="on")
    ElementTree.SubElement(serial, "target", port="0")
    if spec.guest_socket is not None:
        controller = ElementTree.SubElement(devices, "controller", type="virtio-serial", index="0")
        _address(controller, 3)
        channel = ElementTree.SubElement(devices, "channel", type="unix")
        ElementTree.SubElement(channel, "source", mode="bind", path=str(spec.guest_socket))
        ElementTree.SubElement(channel, "target", type="virtio", name=CHANNEL_NAME)
    else:
        vsock = ElementTree.SubElement(devices, "vsock", model="virtio")
        ElementTree.SubElement(vsock, "cid", auto="yes")
        _address(vsock, 3)
    ElementTree.SubElement(devices, "memballoon", model="none")


def _address(device: ElementTree.Element, slot: int) -> None:
    ElementTree.SubElement(
        device, "address", type="pci", domain="0x0000", bus="0x00", slot=f"0x{slot:02x}", function="0x0"
    )


def _text(parent: ElementTree.Element, tag: str, text: str, **attributes: str) -> None:
    ElementTree.SubElement(parent, tag, attributes).text = text
