"""Cold boots: machines that start from an image, as templates do. All others are thawed (see `thaw`).

The kernel process imports this module, so what only a cold boot needs (pydantic) is imported when it happens.
"""

import os
import secrets
import uuid
from typing import TYPE_CHECKING

from agentvm_kernel.hypervisor import accelerator
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import MachineFiles, give, write_private
from agentvm_kernel.hypervisor.machine import GUEST_PORT, Machine, new_name
from agentvm_kernel.hypervisor.states import Hardware
from agentvm_kernel.hypervisor.tags import Owner, Tags

if TYPE_CHECKING:
    from agentvm_kernel.image.store import Image


def boot_machine(
    hypervisor: Hypervisor,
    image: "Image",
    profile: str,
    *,
    name: str | None = None,
    template: bool = False,
    vsock: bool | None = None,
) -> Machine:
    """Boot a machine from an image and return it when QEMU runs; the guest needs seconds more until its runtime answers.

    Args:
        hypervisor: where.
        image: what to boot.
        profile: name of its resource profile.
        name: of the machine; None makes one up.
        template: prepare it for `freeze.freeze_template`: its memory is kept in a file, where that can be.
        vsock: reach it over virtio-vsock; None does where the host can.

    Raises:
        ConfigError: the profile or the name is not valid.
        HostError: QEMU, libvirt or a permission is missing.
    """
    from agentvm_kernel.hypervisor import internal, mechanism
    from agentvm_kernel.hypervisor.domain_xml import CMDLINES, DomainSpec, build
    from agentvm_kernel.hypervisor.profiles import get_profile
    from agentvm_kernel.hypervisor.qcow2 import create_overlay
    from agentvm_kernel.image.initramfs import machine_initrd
    from agentvm_kernel.image.runtime import runtime_digest
    from agentvm_kernel.transport.host import vsock_available

    size = get_profile(profile)
    pass_through = mechanism.choose(hypervisor).kind == "pass-through"
    files = MachineFiles.of(name or new_name())
    kind = accelerator.choose().kind
    use_vsock = vsock_available() if vsock is None else vsock
    hardware = Hardware(
        profile=size.name,
        vcpus=size.vcpus,
        memory_mib=size.memory_mib,
        disk_gib=size.disk_gib,
        cpu_quota_percent=size.cpu_quota_percent,
        accelerator=kind,
        image=image.digest,
        runtime=runtime_digest(),
        vsock=use_vsock,
    )
    tags = Tags(
        owner=Owner.current(), folder=files.folder, profile=size.name, state="template" if template else "booting"
    )
    user = hypervisor.qemu_user
    secret = secrets.token_bytes(32)
    files.claim()
    machine = Machine(hypervisor, files, uuid=str(uuid.uuid4()), hardware=hardware, tags=tags, secret=secret)
    try:
        files.prepare(user, machine.record())
        write_private(files.secret, secret)
        boot = {"hostname": files.name, "preload": list(image.preload), "port": GUEST_PORT}
        write_private(files.initrd, machine_initrd(image, boot, secret), user=user, mode=0o400)
        create_overlay(files.overlay, image.disk, size=size.disk_gib << 30)
        give(files.overlay, user)
        if template and pass_through:
            write_private(files.memory, b"", user=user)
            os.truncate(files.memory, size.memory_mib << 20)
        spec = DomainSpec(
            name=files.name,
            uuid=uuid.UUID(machine.uuid),
            genid=uuid.uuid4(),
            profile=size,
            accelerator=kind,
            kernel=image.kernel,
            initrd=files.initrd,
            cmdline=CMDLINES[kind],
            disk=files.overlay,
            serial_log=files.serial_log,
            guest_socket=None if use_vsock else files.guest_socket,
            pid_file=files.pid_file,
            memory_file=files.memory if template and pass_through else None,
            qemu_user=hypervisor.dac_user,
            pass_through=pass_through,
            tags=tags,
        )
        machine.start(build(spec))
        if not pass_through:
            internal.note_pid(machine)
        machine.set_limits()
    except BaseException:
        machine.destroy()
        raise
    return machine
