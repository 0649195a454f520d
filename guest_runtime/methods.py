"""What a guest tells about itself: the methods that only read. Standard library only, no subprocesses."""

import os
import platform
import socket
import sys
import time
from pathlib import Path
from typing import Any

from guest_runtime import __version__

_STARTED = time.monotonic()
_DISK_TYPES = frozenset({"ext4", "xfs", "btrfs", "tmpfs", "vfat", "overlay"})


def ping() -> str:
    """Answer."""
    return "pong"


def info() -> dict[str, Any]:
    """Version of the runtime and of Python, process id, seconds since it started."""
    return {
        "runtime": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "pid": os.getpid(),
        "running_s": round(time.monotonic() - _STARTED, 3),
    }


def system() -> dict[str, Any]:
    """Operating system, kernel, CPUs, memory in bytes, load, seconds since boot."""
    memory = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        memory[name] = int(value.split()[0]) * 1024
    release = {}
    os_release = Path("/etc/os-release")
    for line in os_release.read_text().splitlines() if os_release.exists() else ():
        name, _, value = line.partition("=")
        release[name] = value.strip('"')
    return {
        "os": release.get("PRETTY_NAME", platform.system()),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "hostname": socket.gethostname(),
        "cpus": os.cpu_count() or 1,
        "load": os.getloadavg(),
        "memory_total": memory["MemTotal"],
        "memory_available": memory["MemAvailable"],
        "uptime_s": float(Path("/proc/uptime").read_text().split()[0]),
        "time_ns": time.time_ns(),
    }


def network() -> list[dict[str, Any]]:
    """Interfaces with hardware address, state, MTU and addresses in CIDR notation."""
    addresses = _ipv6_addresses()
    for name, address in _ipv4_addresses():
        addresses.setdefault(name, []).insert(0, address)
    found = []
    for folder in sorted(Path("/sys/class/net").iterdir()):
        if not folder.is_dir():
            continue
        found.append(
            {
                "name": folder.name,
                "mac": (folder / "address").read_text().strip(),
                "up": bool(int((folder / "flags").read_text(), 16) & 1),
                "mtu": int((folder / "mtu").read_text()),
                "addresses": addresses.get(folder.name, []),
            }
        )
    return found


def disks() -> list[dict[str, Any]]:
    """Mounted file systems with their size and free space in bytes."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, where, kind = line.split()[:3]
        if kind not in _DISK_TYPES:
            continue
        path = where.encode().decode("unicode_escape")
        try:
            usage = os.statvfs(path)
        except OSError:
            continue  # not ours to look at
        found.append(
            {
                "device": device,
                "mount": path,
                "type": kind,
                "size": usage.f_blocks * usage.f_frsize,
                "free": usage.f_bavail * usage.f_frsize,
            }
        )
    return found


def _ipv4_addresses() -> list[tuple[str, str]]:
    """Interface names with their IPv4 address, asked by ioctl (netdevice(7))."""
    import fcntl
    import struct

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                address = fcntl.ioctl(probe, 0x8915, request)[20:24]  # SIOCGIFADDR
                mask = fcntl.ioctl(probe, 0x891B, request)[20:24]  # SIOCGIFNETMASK
            except OSError:
                continue  # it has none
            bits = int.from_bytes(mask, "big").bit_count()
            found.append((name, f"{socket.inet_ntoa(address)}/{bits}"))
    return found


def _ipv6_addresses() -> dict[str, list[str]]:
    table = Path("/proc/net/if_inet6")
    found: dict[str, list[str]] = {}
    for line in table.read_text().splitlines() if table.exists() else ():
        address, _, prefix, _, _, name = line.split()
        text = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))
        found.setdefault(name, []).append(f"{text}/{int(prefix, 16)}")
    return found
