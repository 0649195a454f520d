"""The byte pipes that hosts come in on: a virtio-serial port, vsock connections, and a Unix socket for local runs.

Every descriptor is non-blocking and watched edge-triggered: after an event it is read and written until it would block. That suits the
virtio-serial port, which reports "hung up" for as long as no host is there and would make a level-triggered loop spin. No timers, so an
idle machine costs nothing. Room to write is watched for only after a write that would have blocked; each message would wake us twice
otherwise.
"""

import contextlib
import os
import select
import socket
from collections.abc import Callable
from pathlib import Path

from guest_runtime.handshake import Event, GuestHandshake
from guest_runtime.wire import MAX_PAYLOAD

PORT_NAME = "org.agentvm.0"
READ_SIZE = 256 * 1024
# A virtio-serial port takes 32 KiB at a time, and an interrupt cannot overtake what has been handed over.
WRITE_SIZE = MAX_PAYLOAD


_QUIET = select.EPOLLIN | select.EPOLLHUP | select.EPOLLET
_BLOCKED = _QUIET | select.EPOLLOUT


class Pipe:
    """One byte pipe with its handshake.

    Args:
        fd: the descriptor; the pipe owns it.
        epoll: tells of its events; see `on_event`.
        link: finds sessions in what comes.
        lasting: a virtio-serial port stays when its host goes; a connection ends.
    """

    def __init__(self, fd: int, epoll: select.epoll, link: GuestHandshake, *, lasting: bool) -> None:
        self.fd = fd
        self._epoll = epoll
        self.link = link
        self.lasting = lasting
        self.open = True
        self.readable = True
        self._writable = True
        self._unsent = memoryview(b"")
        epoll.register(fd, _QUIET)

    def on_event(self) -> None:
        """Something happened at the descriptor: try both directions again."""
        self.readable = True
        self._set_writable(True)

    def _set_writable(self, writable: bool) -> None:
        if writable != self._writable:
            self._writable = writable
            self._epoll.modify(self.fd, _QUIET if writable else _BLOCKED)

    def read(self) -> list[Event]:
        """Read once and return what it brought."""
        try:
            data = os.read(self.fd, READ_SIZE)
        except BlockingIOError:
            self.readable = False
            return []
        except OSError:
            data = b""
        if data:
            return self.link.feed(data)
        self.readable = False
        if not self.lasting:
            self.open = False
        self._unsent = memoryview(b"")
        return self.link.end_session("the host is gone")

    @property
    def unsent(self) -> bool:
        """Whether something was taken from the session that the descriptor did not take yet."""
        return self.open and bool(self._unsent)

    @property
    def sendable(self) -> bool:
        """Whether `write` has something to do and the descriptor takes it."""
        return self.open and self._writable and (bool(self._unsent) or self.link.writable)

    def write(self) -> None:
        """Write once."""
        if not self._unsent:
            self._unsent = memoryview(b"".join(self.link.data_to_send(WRITE_SIZE)))
        try:
            written = os.write(self.fd, self._unsent)
        except BlockingIOError:
            self._set_writable(False)
        except OSError:
            # A host that went away shows at the next read, too; a port without one takes nothing.
            self._set_writable(False)
            self.open = self.lasting
        else:
            self._unsent = self._unsent[written:]

    def close(self) -> None:
        """Close the descriptor."""
        self.open = False
        with contextlib.suppress(OSError):
            os.close(self.fd)


def open_virtio_port() -> int | None:
    """Open the virtio-serial port of this machine, or return None when it has none."""
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == PORT_NAME:
            return os.open(f"/dev/{name.parent.name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    return None


def listen_vsock(port: int) -> socket.socket | None:
    """Listen on AF_VSOCK for any CID, or return None when this machine has no vsock."""
    try:
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind((socket.VMADDR_CID_ANY, port))
        listener.listen(8)
    except OSError:
        return None
    return listener


def listen_unix(path: Path) -> socket.socket:
    """Listen on a Unix socket that only its owner can use."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(8)
    return listener


def accept(listener: socket.socket, epoll: select.epoll, make_link: Callable[[], GuestHandshake]) -> Pipe | None:
    """Accept one connection, or return None when there is none (any more)."""
    try:
        connection, _ = listener.accept()
    except OSError:
        return None
    connection.setblocking(False)
    return Pipe(connection.detach(), epoll, make_link(), lasting=False)
