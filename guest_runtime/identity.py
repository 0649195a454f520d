"""Gives a machine an identity of its own, before its first cell (HAZARDS 1-4 and 6).

A machine thawed from a snapshot shares everything with its siblings: the kernel's random numbers, host name, ids, and its clock
stands where it was frozen. Each function renews one of these and raises OSError where it cannot. No subprocesses: this is on the
path of every start. Standard library only; needs root.
"""

import contextlib
import ctypes
import fcntl
import ipaddress
import os
import re
import socket
import struct
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

# <linux/random.h>
_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207
_MS_BIND = 4096
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_HELD = "/run/agentvm/identity"
_OWN_BOOT_ID = f"{_HELD}/boot_id"
_IN_ETC = ("hostname", "hosts", "machine-id")
# Compiled before the template is frozen: a thawed machine would need longer for that than for what it checks.
_HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_MACHINE_ID = re.compile(r"[0-9a-f]{32}")

# <linux/netlink.h>, <linux/sock_diag.h>, <linux/inet_diag.h>, <net/tcp_states.h>
_NETLINK_SOCK_DIAG = 4
_SOCK_DESTROY = 21
_NLMSG_ERROR = 2
_NLM_F_REQUEST, _NLM_F_ACK = 1, 4
_ALL_STATES = 0xFFFFFFFF
_NO_COOKIE = 0xFFFFFFFF
_TIME_WAIT, _CLOSE, _LISTEN = 6, 7, 10


def reseed_kernel(entropy: bytes) -> None:
    """Mix the host's entropy into the kernel's generator and make it reseed from that at once."""
    device = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, _RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
        fcntl.ioctl(device, _RNDRESEEDCRNG)
    finally:
        os.close(device)


def set_clock(time_ns: int) -> None:
    """Set the wall clock to the host's, in nanoseconds since the epoch; the monotonic clock is left alone."""
    time.clock_settime_ns(time.CLOCK_REALTIME, time_ns)


def prepare() -> None:
    """Let the files of a machine's identity lie in memory; once, at boot.

    The first write to the disk after a thaw costs more than all the rest of a new identity.
    """
    os.makedirs(_HELD, mode=0o755, exist_ok=True)
    for name in _IN_ETC:
        held, shown = f"{_HELD}/{name}", f"/etc/{name}"
        try:
            data = Path(shown).read_bytes()
        except FileNotFoundError:
            data = b""
        _overwrite(held, data)
        fresh = f"{shown}.agentvm"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        os.symlink(held, fresh)
        os.replace(fresh, shown)
    renew_boot_id()


def set_hostname(name: str) -> None:
    """Set the host name, also in the files that hold it."""
    if not _HOSTNAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a host name")
    socket.sethostname(name)
    _set_in_etc("hostname", f"{name}\n".encode())
    _set_in_etc("hosts", f"127.0.0.1 localhost {name}\n::1 localhost ip6-localhost\n".encode())


def set_machine_id(machine_id: str) -> None:
    """Set the id of machine-id(5): 32 hexadecimal digits."""
    if not _MACHINE_ID.fullmatch(machine_id):
        raise ValueError("a machine id has 32 hexadecimal digits")
    _set_in_etc("machine-id", f"{machine_id}\n".encode())


def renew_boot_id() -> None:
    """Make boot_id a fresh one: the kernel's own cannot be changed, so a file of ours lies over it."""
    wanted = f"{uuid.UUID(bytes=os.urandom(16), version=4)}\n".encode()
    mounted = os.path.exists(_OWN_BOOT_ID)
    _overwrite(_OWN_BOOT_ID, wanted)
    if not mounted:
        mount(_OWN_BOOT_ID, _BOOT_ID, "", _MS_BIND)
    with open(_BOOT_ID, "rb", buffering=0) as shown:
        if shown.read(64) != wanted:
            raise OSError(f"{_BOOT_ID} does not show the new id")


def _set_in_etc(name: str, data: bytes) -> None:
    """Write a file in /etc: in memory, unless the user has put a file of their own in the place of our link."""
    held, shown = f"{_HELD}/{name}", f"/etc/{name}"
    try:
        ours = os.readlink(shown) == held
    except OSError:
        ours = False
    if ours:
        _overwrite(held, data)
    else:
        replace(Path(shown), data)


def _overwrite(path: str, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file so that it holds either the old or the new, whatever happens."""
    fresh = path.with_name(f".{path.name}.agentvm")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)
    fresh.replace(path)


@dataclass(frozen=True)
class Connection:
    """A TCP connection: both ends as packed addresses (4 or 16 bytes) and ports."""

    local: bytes
    local_port: int
    remote: bytes
    remote_port: int


def connections() -> list[Connection]:
    """Return the TCP connections that lead out of this machine (proc_net_tcp.txt in the kernel's documentation)."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except FileNotFoundError:
            continue  # a kernel without IPv6
        for line in lines:
            _, local, remote, state = line.split(None, 4)[:4]
            if int(state, 16) not in (_TIME_WAIT, _CLOSE, _LISTEN):
                connection = Connection(*_end_point(local), *_end_point(remote))
                if not _is_loopback(connection.remote):
                    found.append(connection)
    return found


def drop_connections() -> None:
    """Reset all TCP connections that lead out of this machine: its siblings have the same.

    Those inside the machine go on. To be called before it gets a network interface, or else the peer is told, and its other siblings
    lose theirs. Protocol: sock_diag(7).

    Raises:
        OSError: one is still there.
    """
    inherited = connections()
    if not inherited:
        return
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diag:
        for one in inherited:
            family = socket.AF_INET if len(one.local) == 4 else socket.AF_INET6
            body = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, _ALL_STATES)
            body += struct.pack(">HH16s16s", one.local_port, one.remote_port, one.local, one.remote)
            body += struct.pack("=III", 0, _NO_COOKIE, _NO_COOKIE)
            diag.send(struct.pack("=IHHII", 16 + len(body), _SOCK_DESTROY, _NLM_F_REQUEST | _NLM_F_ACK, 1, 0) + body)
            answer = diag.recv(8192)
            _, kind, _, _, _ = struct.unpack_from("=IHHII", answer)
            error = -struct.unpack_from("=i", answer, 16)[0] if kind == _NLMSG_ERROR else 0
            if error not in (0, 2):  # ENOENT: it went by itself
                raise OSError(error, f"an inherited TCP connection cannot be dropped: {os.strerror(error)}")
    if set(inherited) & set(connections()):
        raise OSError("inherited TCP connections are still there")


def _end_point(text: str) -> tuple[bytes, int]:
    """Parse "0100007F:0016": words of the address in the machine's byte order, then the port."""
    words, _, port = text.partition(":")
    address = b"".join(struct.pack("=I", int(words[at : at + 8], 16)) for at in range(0, len(words), 8))
    return address, int(port, 16)


def _is_loopback(address: bytes) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


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
