"""Gives a machine an identity of its own, before its first cell (HAZARDS 1-4 and 6).

A machine thawed from a snapshot shares everything with its siblings: the kernel's random numbers, host name, ids, and its clock
stands where it was frozen. Each function renews one of these and raises OSError where it cannot. No subprocesses: this is on the
path of every start. Standard library only; needs root.
"""

import ctypes
import fcntl
import os
import re
import socket
import struct
import time
import uuid
from pathlib import Path

# <linux/random.h>
_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207
_MS_BIND = 4096
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_OWN_BOOT_ID = "/run/agentvm/boot_id"


def reseed_kernel(entropy: bytes) -> None:
    """Mix the host's entropy into the kernel's generator and make it reseed from that at once."""
    with Path("/dev/urandom").open("wb", buffering=0) as device:
        fcntl.ioctl(device, _RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
        fcntl.ioctl(device, _RNDRESEEDCRNG)


def set_clock(time_ns: int) -> None:
    """Set the wall clock to the host's, in nanoseconds since the epoch; the monotonic clock is left alone."""
    time.clock_settime_ns(time.CLOCK_REALTIME, time_ns)


def set_hostname(name: str) -> None:
    """Set the host name, also in the files that hold it."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise ValueError(f"{name!r} is not a host name")
    socket.sethostname(name)
    Path("/etc/hostname").write_text(f"{name}\n")
    Path("/etc/hosts").write_text(f"127.0.0.1 localhost {name}\n::1 localhost\n")


def set_machine_id(machine_id: str) -> None:
    """Set the id of machine-id(5): 32 hexadecimal digits."""
    if not re.fullmatch(r"[0-9a-f]{32}", machine_id):
        raise ValueError("a machine id has 32 hexadecimal digits")
    Path("/etc/machine-id").write_text(f"{machine_id}\n")


def renew_boot_id() -> None:
    """Make boot_id a fresh one: the kernel's own cannot be changed, so a file of ours lies over it."""
    own = Path(_OWN_BOOT_ID)
    mounted = own.exists()
    own.write_text(f"{uuid.UUID(bytes=os.urandom(16), version=4)}\n")
    if not mounted:
        own.chmod(0o444)
        mount(str(own), _BOOT_ID, "", _MS_BIND)


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2), which Python does not have.

    Raises:
        OSError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.mount(
        source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), options.encode() or None
    )
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)}: mount {source} on {target}")
