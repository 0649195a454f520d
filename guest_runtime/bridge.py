"""Relays Jupyter messages between the connection to the host and the sockets of the Python kernel.

On the connection a message is [header, parent_header, metadata, content, *buffers]; ipykernel wants identities, a delimiter and a
signature in front (https://jupyter-client.readthedocs.io/en/stable/messaging.html#wire-protocol). Its key is empty: the sockets are
files that only its user and root can reach. What passes is not parsed, so a message costs next to nothing. Needs pyzmq.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from guest_runtime.kernel import address
from guest_runtime.warm_up import Request
from guest_runtime.wire import MAX_MESSAGE, MAX_PARTS, Channel

DELIMITER = b"<IDS|MSG>"
MAX_QUEUED = 4 * 1024 * 1024
"""So much output may wait for the host, in bytes; beyond that it waits in ZeroMQ, and then in ipykernel (see kernel_launcher)."""
BATCH = 64
"""Messages taken from one socket before the others have a turn."""
RECEIVED_AHEAD = 32
ASK: Request = ("comm_info_request", {"target_name": "agentvm"})
"""Changes nothing. A kernel_info_request would: IPython picks a tip for its banner, and so draws from the user's `random`."""
LARGEST = MAX_MESSAGE - 4 * (MAX_PARTS + 1)
"""What fits on the connection, in bytes of all parts; the table of lengths comes on top."""

Send = Callable[[int, list[bytes]], None]
_KINDS = (
    (Channel.CONTROL, "control_port", zmq.DEALER),
    (Channel.SHELL, "shell_port", zmq.DEALER),
    (Channel.STDIN, "stdin_port", zmq.DEALER),
    (Channel.IOPUB, "iopub_port", zmq.SUB),
)


class Bridge:
    """The agent's own client of one ipykernel process.

    Args:
        folder: where that has its sockets.
        send: queues a message for the host.
    """

    def __init__(self, folder: Path, send: Send) -> None:
        self._send = send
        self._context = zmq.Context()
        # Shell and stdin share an identity: ipykernel asks for input on stdin whoever sent the cell on shell.
        identity = os.urandom(16)
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        for channel, port, kind in _KINDS:
            socket: zmq.Socket[bytes] = self._context.socket(kind)
            socket.linger = 0
            if kind == zmq.SUB:
                socket.rcvhwm = RECEIVED_AHEAD
                socket.subscribe(b"")
            else:
                socket.rcvhwm = socket.sndhwm = 0
                socket.setsockopt(zmq.IDENTITY, identity)
            socket.connect(address(folder, port))
            self._sockets[int(channel)] = socket
        self.sockets = {socket: channel for channel, socket in self._sockets.items()}
        self._probes: dict[bytes, tuple[set[bytes], Callable[[], None]]] = {}

    @property
    def probing(self) -> bool:
        """Whether a probe waits for its answer."""
        return bool(self._probes)

    def to_kernel(self, channel: int, parts: list[bytes]) -> None:
        """Pass a message of the host's on."""
        socket = self._sockets.get(channel)
        if socket is not None and channel != Channel.IOPUB and len(parts) >= 4:
            socket.send_multipart([DELIMITER, b"", *parts], copy=False)

    def from_kernel(self, socket: "zmq.Socket[bytes]", queued: Callable[[int], int]) -> None:
        """Pass on what has come from the kernel on a socket that is readable, until the host has enough to take."""
        channel = self.sockets[socket]
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
            if len(parts) < 4 or (self._probes and self._answers_probe(channel, parts)):
                continue
            self._send(channel, _bounded(channel, parts))
            if queued(channel) >= MAX_QUEUED:
                return

    # ---- probes: requests of our own

    def probe(self, on_done: Callable[[], None], request: Request = ASK) -> None:
        """Send a request of our own behind everything that was sent, and tell when its reply and its `idle` are back.

        By then everything before it is done and all output of that has passed; the host does not see the probe. One that was sent
        before ipykernel knew of our subscription never sees its `idle`, but is done with the next one that does.

        Args:
            on_done: called then, from `from_kernel`.
            request: what to ask; the answer itself is dropped.
        """
        name = os.urandom(16).hex()
        header = {
            "msg_id": name,
            "msg_type": request[0],
            "session": name,
            "username": "agentvm",
            "version": "5.3",
            "date": "1970-01-01T00:00:00Z",
        }
        self._probes[name.encode()] = ({b"reply", b"idle"}, on_done)
        self.to_kernel(Channel.SHELL, [json.dumps(header).encode(), b"{}", b"{}", json.dumps(request[1]).encode()])

    def _answers_probe(self, channel: int, parts: list[bytes]) -> bool:
        """Take a message out that answers a probe."""
        name = next((name for name in self._probes if name in parts[1]), None)
        if name is None:
            return False
        waiting = self._probes[name][0]
        if channel == Channel.SHELL:
            waiting.discard(b"reply")
        elif channel == Channel.IOPUB and b'"idle"' in parts[3]:
            waiting.discard(b"idle")
        if not waiting:
            for earlier in list(self._probes):
                self._probes.pop(earlier)[1]()
                if earlier == name:
                    break
        return True

    def close(self) -> None:
        """Drop the sockets."""
        self._context.destroy(linger=0)


def _bounded(channel: int, parts: list[bytes]) -> list[bytes]:
    """Return a message, or one that says what is missing where it is too big for the connection."""
    size = sum(map(len, parts))
    if size <= LARGEST and len(parts) <= MAX_PARTS:
        return parts
    problem = (
        f"agentvm: a message of {size >> 20} MiB in {len(parts)} parts was left out;"
        f" {LARGEST >> 20} MiB in {MAX_PARTS} parts leave the machine at a time"
    )
    header = json.loads(parts[0])
    content: dict[str, Any] = {"status": "error", "ename": "OutputTooLarge", "evalue": problem, "traceback": []}
    if channel == Channel.IOPUB:
        header["msg_type"] = "stream"
        content = {"name": "stderr", "text": f"{problem}\n"}
    return [json.dumps(header).encode(), parts[1], b"{}", json.dumps(content).encode()]
