"""The disk layers under a machine: each snapshot adds one, and QEMU and libvirt take longer with each, so they are drawn together again.

The kernel process imports this module with time travel.
"""

import time
from pathlib import Path

from agentvm_kernel.errors import MachineTimeout
from agentvm_kernel.hypervisor.machine import Machine
from agentvm_kernel.hypervisor.qcow2 import backing_file
from agentvm_kernel.hypervisor.snapshot import layers_dir
from agentvm_kernel.hypervisor.states import MachineState
from agentvm_kernel.log import get_logger

log = get_logger(__name__)

DISK = "vda"
MAX_LAYERS = 8
"""More layers than these under a machine are drawn together."""
MAX_BYTES = 1 << 30
"""Layers that hold more than this are left alone: copying them would cost more than they do."""
TIMEOUT_S = 120.0
LOOK_S = 0.05


def layers_under(machine: Machine) -> list[Path]:
    """Return the layers that the machine's overlay rests on, without the guest image."""
    found: list[Path] = []
    layer = backing_file(machine.overlay)
    while layer is not None and layer.parent == layers_dir():
        found.append(layer)
        layer = backing_file(layer)
    return found


def draw_together(machine: Machine) -> None:
    """Copy what is in the layers under a machine into its own overlay, where they have become many; nothing else may use its disk.

    The layers stay as they are for the snapshots that rest on them. What fails leaves a disk that is as right as before.

    Raises:
        LibvirtError: libvirt or QEMU refuses.
        MachineTimeout: it takes too long; it was stopped then.
    """
    layers = layers_under(machine)
    if len(layers) <= MAX_LAYERS or machine.state is not MachineState.RUNNING:
        return
    if sum(layer.stat().st_blocks * 512 for layer in layers) > MAX_BYTES:
        return
    image = backing_file(layers[-1])
    began = time.monotonic()
    with machine.hypervisor.errors(f"drawing together the disk layers of machine {machine.name}"):
        domain = machine.domain
        domain.blockRebase(DISK, str(image) if image is not None else None, 0, 0)
        # libvirt also sends an event, on another thread than the one that may wait here; a look costs it nothing.
        while domain.blockJobInfo(DISK, 0):
            if time.monotonic() - began > TIMEOUT_S:
                domain.blockJobAbort(DISK, 0)
                raise MachineTimeout(f"The disk layers of machine {machine.name} could not be drawn together in time.")
            time.sleep(LOOK_S)
    log.debug(
        "disk_drawn_together", machine=machine.name, layers=len(layers), seconds=round(time.monotonic() - began, 3)
    )
