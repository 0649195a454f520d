"""The states of a machine, which may follow which, and what a machine is made of. Light: the kernel process imports it."""

import enum
from dataclasses import dataclass

import libvirt


class MachineState(enum.Enum):
    """Where a machine is in its life."""

    DEFINED = "defined"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    SHUT_OFF = "shut off"
    CRASHED = "crashed"

    @property
    def ended(self) -> bool:
        """Whether QEMU is gone for good."""
        return self in (MachineState.SHUT_OFF, MachineState.CRASHED)


_ENDS = {MachineState.SHUT_OFF, MachineState.CRASHED}
TRANSITIONS: dict[MachineState, set[MachineState]] = {
    MachineState.DEFINED: {MachineState.STARTING, MachineState.SHUT_OFF},
    MachineState.STARTING: {MachineState.RUNNING, MachineState.PAUSED, *_ENDS},
    MachineState.RUNNING: {MachineState.PAUSED, MachineState.STOPPING, *_ENDS},
    MachineState.PAUSED: {MachineState.RUNNING, MachineState.STOPPING, *_ENDS},
    MachineState.STOPPING: {MachineState.RUNNING, MachineState.PAUSED, *_ENDS},
    MachineState.SHUT_OFF: set(),
    MachineState.CRASHED: set(),
}

STOPPED_REASONS = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN: "the guest shut down",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED: "it was destroyed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED: "the guest crashed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED: "it was migrated away",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SAVED: "it was saved",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED: "QEMU died or was killed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT: "it was reverted to a state in which it was off",
}


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a machine is made of, for messages and for comparing with a snapshot.

    Attributes:
        profile: name of its resource profile.
        vcpus: virtual CPUs.
        memory_mib: memory in MiB.
        disk_gib: size of its disk in GiB.
        cpu_quota_percent: host CPU time that it may use, in percent of one CPU.
        accelerator: "kvm" or "tcg".
        image: digest of the guest image that it was booted from.
        runtime: digest of the guest runtime that runs in it.
        vsock: it is reached over virtio-vsock, otherwise over a virtio-serial port.
    """

    profile: str
    vcpus: int
    memory_mib: int
    disk_gib: int
    cpu_quota_percent: int
    accelerator: str
    image: str
    runtime: str
    vsock: bool
