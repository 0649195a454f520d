"""Which accelerator machines run on: KVM where it really runs guests, otherwise QEMU's own emulation (TCG).

A device node proves little: there are hosts where /dev/kvm opens and a stock kernel then hangs, since the CPU has no virtualisation
extension. So on x86 the CPU must show one as well. Standard library only: the kernel process imports this module.
"""

import os
import platform
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agentvm_kernel.errors import ConfigError, HostError

KVM_DEVICE = Path("/dev/kvm")
CPUINFO = Path("/proc/cpuinfo")
VARIABLE = "AGENTVM_ACCEL"


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What runs the guests' instructions.

    Attributes:
        kind: "kvm" or "tcg".
        reason: one sentence for people that says why.
    """

    kind: Literal["kvm", "tcg"]
    reason: str


def choose(wanted: str | None = None, *, device: Path = KVM_DEVICE, cpuinfo: Path = CPUINFO) -> Accelerator:
    """Return the accelerator for new machines.

    Args:
        wanted: "auto", "kvm" or "tcg"; None reads AGENTVM_ACCEL, whose default is "auto".
        device: path of the KVM device.
        cpuinfo: path of the CPU's description.

    Raises:
        ConfigError: `wanted` is none of the three.
        HostError: "kvm" was asked for and its device does not open.
    """
    wanted = wanted or os.environ.get(VARIABLE) or "auto"
    if wanted not in ("auto", "kvm", "tcg"):
        raise ConfigError(f"{VARIABLE} is {wanted!r}.", hint="It can be auto, kvm or tcg.")
    if wanted == "tcg":
        return Accelerator("tcg", f"software emulation, as {VARIABLE} asks for")
    problem = _device_problem(device)
    if wanted == "kvm":
        if problem:
            raise HostError(f"{VARIABLE} asks for kvm, but {problem}.", hint=f"Unset {VARIABLE} to let agentvm choose.")
        return Accelerator("kvm", f"KVM, as {VARIABLE} asks for")
    if not problem and platform.machine() in ("x86_64", "i686") and not _has_extension(cpuinfo):
        problem = f"{device} opens, but the CPU shows neither vmx nor svm (nested virtualisation is off)"
    if problem:
        return Accelerator("tcg", f"software emulation (several times slower than KVM): {problem}")
    return Accelerator("kvm", "KVM")


def qemu_user_problem(uid: int, gid: int, *, device: Path = KVM_DEVICE) -> str:
    """Return why QEMU's user may not open the KVM device, empty when it may.

    Where it may not although libvirt's own probe could, libvirt throws its cache of QEMU's capabilities away at every
    call: defining one machine then takes more than a minute.

    Args:
        uid: user that QEMU runs as.
        gid: its primary group.
        device: path of the KVM device.
    """
    try:
        status = device.stat()
    except OSError as error:
        return f"{device}: {error.strerror}"
    if uid == 0:
        return ""
    try:
        account = pwd.getpwuid(uid)
        # libvirt gives QEMU all groups of its user, the user's own primary group among them.
        groups = {gid, *os.getgrouplist(account.pw_name, account.pw_gid)}
        name = account.pw_name
    except KeyError:
        groups, name = {gid}, str(uid)
    if uid == status.st_uid:
        allowed = stat.S_IRUSR | stat.S_IWUSR
    elif status.st_gid in groups:
        allowed = stat.S_IRGRP | stat.S_IWGRP
    else:
        allowed = stat.S_IROTH | stat.S_IWOTH
    if status.st_mode & allowed == allowed:
        return ""
    return f"QEMU's user {name} may not open {device} (mode {stat.S_IMODE(status.st_mode):04o}); chgrp kvm and chmod 0660 it"


def _device_problem(device: Path) -> str:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"{device} does not exist"
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    return ""


def _has_extension(cpuinfo: Path) -> bool:
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("flags"):
            flags = line.split()
            return "vmx" in flags or "svm" in flags
    return False
