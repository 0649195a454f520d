"""What machines there are: read from libvirt's metadata, the machines' folders and /proc. Changes nothing.

Only machines of this state folder count: those of another AGENTVM_STATE_DIR belong to somebody else's inventory. The kernel process never
imports this module.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt

from agentvm_kernel.errors import ConfigError, HostError, UnknownMachineError
from agentvm_kernel.hypervisor.connection import Hypervisor, default_uri
from agentvm_kernel.hypervisor.files import CLAIMED, READY, MachineFiles, machines_dir, read_untrusted
from agentvm_kernel.hypervisor.reap import qemu_alive, read_tags
from agentvm_kernel.hypervisor.states import MachineState
from agentvm_kernel.hypervisor.tags import Owner, Tags
from agentvm_kernel.log import get_logger

log = get_logger(__name__)

GONE = "gone"
"""State of a machine whose QEMU has ended while its files are still here; `reap` removes it once its owner is gone too."""
UNKNOWN = "unknown"
"""State of a machine whose libvirt does not answer."""
START_S = 10.0
"""A machine without QEMU whose folder is younger may be one that is being made."""

_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: MachineState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: MachineState.RUNNING,
    libvirt.VIR_DOMAIN_PMSUSPENDED: MachineState.PAUSED,
    libvirt.VIR_DOMAIN_PAUSED: MachineState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: MachineState.STOPPING,
    libvirt.VIR_DOMAIN_SHUTOFF: MachineState.SHUT_OFF,
    libvirt.VIR_DOMAIN_CRASHED: MachineState.CRASHED,
}


@dataclass(frozen=True, slots=True)
class MachineInfo:
    """One machine as it is now.

    Attributes:
        name: of the domain.
        uuid: of the domain.
        uri: of its libvirt.
        state: one of `MachineState`'s values, GONE or UNKNOWN.
        use: what it is used as: "booting", "leased", "preparing" (for the pool), "ready" (in the pool), "claimed" (out of the pool, about
            to be leased), "template" (one is being made of it); empty where that is not known.
        owner_pid: process that has it.
        owner_alive: whether that process still runs; a machine without one is removed soon, unless it is ready.
        profile: its resource profile.
        vcpus: virtual CPUs.
        memory_mib: the guest's memory in MiB.
        disk_gib: size of its disk in GiB.
        accelerator: "kvm" or "tcg".
        image: digest of its guest image.
        template: id of the snapshot that it was thawed from; empty after a cold boot.
        created: UTC, ISO 8601.
        uptime_s: seconds since its QEMU was started; None where there is none.
        qemu_pid: process id of its QEMU.
        cpu_s: CPU time that it has used, in seconds.
        pss_bytes: host memory that its QEMU takes, its share of what it has in common with others included (proc(5)); None where that
            cannot be read.
        disk_bytes: what its own disk layers take on the host.
        folder: its files.
    """

    name: str
    uuid: str
    uri: str
    state: str
    use: str
    owner_pid: int
    owner_alive: bool
    profile: str
    vcpus: int
    memory_mib: int
    disk_gib: int
    accelerator: str
    image: str
    template: str
    created: str
    uptime_s: float | None
    qemu_pid: int | None
    cpu_s: float | None
    pss_bytes: int | None
    disk_bytes: int
    folder: str

    @property
    def in_use(self) -> bool:
        """Whether a living process works with it."""
        return self.owner_alive and self.use not in ("ready", "claimed")


def list_machines(uri: str | None = None) -> list[MachineInfo]:
    """Return all machines, oldest first.

    Args:
        uri: libvirt that is asked beside those that machines here were started with; None takes the default.

    Raises:
        HostError: that libvirt does not answer. (Of others only the machines' states are unknown then.)
    """
    main = uri or default_uri()
    records = dict(_records())
    uris = {main} | {str(record.get("uri")) for record in records.values() if record.get("uri")}
    found: dict[str, MachineInfo] = {}
    for each in sorted(uris, key=lambda one: one != main):
        mine = {name: record for name, record in records.items() if record.get("uri", main) == each}
        try:
            with Hypervisor(each) as hypervisor:
                found |= {info.name: info for info in _of_libvirt(hypervisor, mine)}
        except HostError as error:
            if each == main:
                raise
            log.warning("libvirt_not_asked", uri=each, error=str(error))
            for name, record in mine.items():
                found[name] = _describe(MachineFiles.of(name), record, each, UNKNOWN, None, None)
    return sorted(found.values(), key=lambda info: (info.created, info.name))


def find(name: str, uri: str | None = None) -> MachineInfo:
    """Return the machine of this name.

    Raises:
        UnknownMachineError: there is none.
        HostError: libvirt does not answer.
    """
    for info in list_machines(uri):
        if info.name == name:
            return info
    raise UnknownMachineError(f"There is no machine {name[:80]!r}.", hint="`agentvm list` shows all.")


def _records() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and machine.json of every machine's folder; one that is only being made has none yet."""
    for folder in machines_dir().iterdir():
        try:
            yield folder.name, MachineFiles.of(folder.name).read_record() or {}
        except ConfigError:
            log.warning("not_a_machine", folder=str(folder))


def _of_libvirt(hypervisor: Hypervisor, records: dict[str, dict[str, Any]]) -> Iterator[MachineInfo]:
    left = dict(records)
    for domain in hypervisor.domains():
        tags = read_tags(domain)
        if tags is None or tags.folder != machines_dir() / domain.name():
            continue
        try:
            number = domain.state()[0]
            cpu_s = domain.info()[4] / 1e9
        except libvirt.libvirtError as error:  # it ends this very moment; its folder tells the rest
            log.debug("machine_went_away", error=str(error))
            continue
        files = MachineFiles.of(domain.name())
        record = left.pop(files.name, None) or files.read_record() or {}
        record = {**record, "uuid": domain.UUIDString()}
        state = _STATES.get(number)
        yield _describe(files, record, hypervisor.uri, state.value if state else UNKNOWN, tags, cpu_s)
    for name, record in left.items():
        files = MachineFiles.of(name)
        if files.folder.exists():
            state_text = MachineState.DEFINED.value if _being_made(files) else GONE
            yield _describe(files, record, hypervisor.uri, state_text, None, None)


def _being_made(files: MachineFiles) -> bool:
    """Whether its QEMU has yet to be started."""
    try:
        return not files.record.exists() or (
            time.time() - files.record.stat().st_mtime < START_S and files.serial_log.stat().st_size == 0
        )
    except FileNotFoundError:
        return True


def _describe(
    files: MachineFiles, record: dict[str, Any], uri: str, state: str, tags: Tags | None, cpu_s: float | None
) -> MachineInfo:
    owner = (tags.owner if tags else None) or files.owner() or Owner(0, 0)
    hardware = record.get("hardware")
    of_hardware = hardware.get if isinstance(hardware, dict) else {}.get
    pid = _qemu_pid(files)
    return MachineInfo(
        name=files.name,
        uuid=str(record.get("uuid", "")),
        uri=uri,
        state=state,
        use=_use(files, tags),
        owner_pid=owner.pid,
        owner_alive=owner.alive(),
        profile=str(of_hardware("profile", tags.profile if tags else "")),
        vcpus=int(of_hardware("vcpus", 0)),
        memory_mib=int(of_hardware("memory_mib", 0)),
        disk_gib=int(of_hardware("disk_gib", 0)),
        accelerator=str(of_hardware("accelerator", "")),
        image=str(of_hardware("image", "")),
        template=str(record.get("template", "")),
        created=str(record.get("created", tags.created if tags else "")),
        uptime_s=_age_s(pid) if pid else None,
        qemu_pid=pid,
        cpu_s=cpu_s,
        pss_bytes=_pss(pid) if pid else None,
        disk_bytes=_disk_bytes(files.folder),
        folder=str(files.folder),
    )


def _use(files: MachineFiles, tags: Tags | None) -> str:
    if any(files.folder.glob(f"{READY}*")):
        return "ready"
    if tags is not None and tags.state != "pooled":
        return tags.state
    if (files.folder / CLAIMED).exists():
        return "claimed"
    return "preparing" if tags is not None else ""


def _qemu_pid(files: MachineFiles) -> int | None:
    if not qemu_alive(files):
        return None
    with contextlib.suppress(OSError, ValueError, HostError):
        return int(read_untrusted(files.pid_file, 32))
    return None


def _age_s(pid: int) -> float | None:
    """Return how many seconds ago a process was started."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _pss(pid: int) -> int | None:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:  # it is another user's, or has just ended
        return None
    return None


def _disk_bytes(folder: Path) -> int:
    total = 0
    for layer in folder.glob("*.qcow2"):
        with contextlib.suppress(FileNotFoundError):
            total += layer.stat().st_blocks * 512
    return total


def as_json(machines: list[MachineInfo]) -> str:
    """Return machines for programs, as a list."""
    from dataclasses import asdict

    return json.dumps([asdict(machine) for machine in machines], indent=1)
