"""Relays Jupyter messages between the connection to the host and the sockets of the Python kernel.

On the connection a message is [header, parent_header, metadata, content, *buffers]; ipykernel wants identities, a delimiter and a
signature in front (https://jupyter-client.readthedocs.io/en/stable/messaging.html#wire-protocol). Its key is empty: the sockets are
files that only its user and root can reach. Nothing is parsed here, so a message costs next to nothing. Needs pyzmq.
"""

import os
from collections.abc import Callable

import zmq

from guest_runtime.wire import MAX_MESSAGE, Channel

DELIMITER = b"<IDS|MSG>"
MAX_QUEUED = 4 * 1024 * 1024
"""So much output may wait for the host, in bytes; beyond that it waits in ipykernel's socket."""
BATCH = 64
"""Messages taken from one socket before the others have a turn."""
IOPUB_BACKLOG = 100_000
"""ZeroMQ drops published messages beyond this; ipykernel collects text for 0.2 s, so no amount of it reaches this."""

Send = Callable[[int, list[bytes]], None]


class Bridge:
    """The agent's own client of the Python kernel.

    Args:
        address: gives the ZeroMQ address of "shell_port" and so on.
        send: queues a message for the host.
        queued: tells how many bytes wait for the host on a channel.
    """

    def __init__(self, address: Callable[[str], str], send: Send, queued: Callable[[int], int]) -> None:
        self._send = send
        self._queued = queued
        self._context = zmq.Context()
        # Shell and stdin share an identity: ipykernel asks for input on stdin whoever sent the cell on shell.
        identity = os.urandom(16)
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        for channel, port, kind in (
            (Channel.CONTROL, "control_port", zmq.DEALER),
            (Channel.SHELL, "shell_port", zmq.DEALER),
            (Channel.STDIN, "stdin_port", zmq.DEALER),
            (Channel.IOPUB, "iopub_port", zmq.SUB),
        ):
            socket: zmq.Socket[bytes] = self._context.socket(kind)
            socket.linger = 0
            if kind == zmq.SUB:
                socket.rcvhwm = IOPUB_BACKLOG
                socket.subscribe(b"")
            else:
                socket.rcvhwm = socket.sndhwm = 0
                socket.setsockopt(zmq.IDENTITY, identity)
            socket.connect(address(port))
            self._sockets[int(channel)] = socket
        self._by_socket = {socket: channel for channel, socket in self._sockets.items()}

    def sockets(self) -> list["zmq.Socket[bytes]"]:
        """The sockets to read from now: not those whose output the host does not take fast enough."""
        return [socket for channel, socket in self._sockets.items() if self._queued(channel) < MAX_QUEUED]

    def to_kernel(self, channel: int, parts: list[bytes]) -> None:
        """Pass a message of the host's on."""
        socket = self._sockets.get(channel)
        if socket is not None and channel != Channel.IOPUB and len(parts) >= 4:
            socket.send_multipart([DELIMITER, b"", *parts], copy=False)

    def from_kernel(self, socket: "zmq.Socket[bytes]") -> None:
        """Pass on what has come from the kernel on a socket that is readable."""
        channel = self._by_socket[socket]
        for _ in range(BATCH):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                start = frames.index(DELIMITER) + 2
            except ValueError:
                continue  # not a Jupyter message; the user's code can write here too
            parts = frames[start:]
            if len(parts) >= 4 and sum(map(len, parts)) < MAX_MESSAGE - 65536:
                self._send(channel, parts)
            if self._queued(channel) >= MAX_QUEUED:
                return

    def close(self) -> None:
        """Drop the sockets."""
        self._context.destroy(linger=0)
