"""The ZeroMQ sockets that Jupyter clients connect to, driven by the asyncio event loop.

A ZeroMQ socket's descriptor is edge-triggered: it becomes readable once, and any use of the socket may consume that
edge (http://api.zeromq.org/4-3:zmq-getsockopt#toc15). So after every send the socket's events are looked at again.
zmq.asyncio does the same with a future for each message; a plain callback costs a fraction of that, and a cell's round
trip crosses here six times. Imports zmq and nothing heavier.
"""

import asyncio
import errno
import socket as tcp
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import zmq

from agentvm_kernel.errors import HostError
from agentvm_kernel.jupyter.connection_file import ConnectionInfo
from agentvm_kernel.jupyter.wire import Buffer

_MAX_RECEIVED_AT_ONCE = 64
_SEND_LINGER_MS = 1000
# Shorter frames are bounded well enough by ZeroMQ's limit of a thousand messages.
_TRACKED_BYTES = 64 * 1024

OnMessage = Callable[[str, list[bytes]], None]
OnSubscribe = Callable[[bytes], None]


class _LoopSocket:
    """One socket whose messages are handed to a callback by the event loop."""

    def __init__(self, socket: "zmq.Socket[bytes]", on_receive: Callable[[list[bytes]], None]) -> None:
        self.socket = socket
        self._on_receive = on_receive
        self._scheduled = False
        self._paused = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        loop.add_reader(self.socket.FD, self._receive)
        self._schedule()

    def stop(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self.socket.FD)
            self._loop = None

    def pause(self, paused: bool) -> None:
        """Stop or continue reading; what clients send meanwhile waits in their sockets."""
        self._paused = paused
        if not paused:
            self._schedule()

    def send(self, frames: "Sequence[Buffer | zmq.Frame]") -> None:
        # ROUTER and XPUB never block: they drop for clients that left or do not read. With copy=False pyzmq still
        # copies frames shorter than its copy_threshold, 64 KiB.
        self.socket.send_multipart(frames, flags=zmq.DONTWAIT, copy=False)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled and self._loop is not None:
            self._scheduled = True
            self._loop.call_soon(self._receive_scheduled)

    def _receive_scheduled(self) -> None:
        self._scheduled = False
        if self._loop is not None:
            self._receive()

    def _receive(self) -> None:
        for _ in range(_MAX_RECEIVED_AT_ONCE):
            if self._paused:
                return
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._on_receive(frames)
        # More may wait: let the other sockets have their turn first.
        self._schedule()


class ClientSockets:
    """The five sockets of a kernel, bound on construction.

    Args:
        info: where to bind; ports that are 0 are chosen.
        listening: by channel, sockets that listen there already; they are taken over.

    Attributes:
        info: as given, with the ports that were chosen.

    Raises:
        HostError: an address is in use or not ours.
    """

    def __init__(self, info: ConnectionInfo, listening: Mapping[str, tcp.socket] | None = None) -> None:
        self.info = info
        self._listening = dict(listening or {})
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # The heartbeat has a context of its own: its thread never needs the interpreter lock, whatever the rest does.
        self._heartbeat_context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            routers = {channel: self._bind(channel, zmq.ROUTER) for channel in ("shell", "control", "stdin")}
            iopub = self._bind("iopub", zmq.XPUB)
            heartbeat = self._bind("hb", zmq.ROUTER)
        except BaseException:
            self._context.destroy(linger=0)
            self._heartbeat_context.destroy(linger=0)
            raise
        self._on_message: OnMessage | None = None
        self._on_subscribe: OnSubscribe | None = None
        self._routers = {
            channel: _LoopSocket(socket, partial(self._received, channel)) for channel, socket in routers.items()
        }
        self._iopub = _LoopSocket(iopub, self._subscription)
        self._waiting: list[tuple[zmq.MessageTracker, int]] = []
        self._waiting_bytes = 0
        self._heartbeat = threading.Thread(target=_beat, args=(heartbeat,), name="heartbeat", daemon=True)
        self._heartbeat.start()

    def start(self, on_message: OnMessage, on_subscribe: OnSubscribe) -> None:
        """Begin to receive; call it in the running event loop.

        Args:
            on_message: called with the channel's name and the frames of each message.
            on_subscribe: called with the topic when a client subscribes to iopub.
        """
        self._on_message, self._on_subscribe = on_message, on_subscribe
        loop = asyncio.get_running_loop()
        for socket in (*self._routers.values(), self._iopub):
            socket.start(loop)

    def send(self, channel: str, frames: Sequence[Buffer]) -> None:
        """Send a message on shell, control or stdin; its first frame names the client, who may have left."""
        self._routers[channel].send(frames)

    def publish(self, frames: Sequence[Buffer]) -> None:
        """Send a message to all iopub subscribers; its first frame is the topic."""
        self._iopub.send([frame if len(frame) < _TRACKED_BYTES else self._track(frame) for frame in frames])

    def _track(self, frame: Buffer) -> zmq.Frame:
        tracked = zmq.Frame(frame, track=True, copy=False)
        self._waiting.append((tracked.tracker, len(frame)))
        self._waiting_bytes += len(frame)
        return tracked

    def backlog(self) -> int:
        """Return how many bytes wait for iopub subscribers, without those of short frames."""
        if self._waiting_bytes:
            self._waiting = [(tracker, size) for tracker, size in self._waiting if not tracker.done]
            self._waiting_bytes = sum(size for _, size in self._waiting)
        return self._waiting_bytes

    def pause(self, channel: str, paused: bool) -> None:
        """Stop or continue receiving on shell, control or stdin."""
        self._routers[channel].pause(paused)

    def close(self) -> None:
        """Close the sockets; what was sent has a second to leave."""
        for socket in (*self._routers.values(), self._iopub):
            socket.stop()
        self._context.destroy(linger=_SEND_LINGER_MS)
        # The heartbeat's socket belongs to its thread: ending the context makes that thread close it.
        self._heartbeat_context.term()
        self._heartbeat.join()

    def _received(self, channel: str, frames: list[bytes]) -> None:
        if self._on_message is not None:
            self._on_message(channel, frames)

    def _subscription(self, frames: list[bytes]) -> None:
        if self._on_subscribe is not None and frames[0][:1] == b"\x01":
            self._on_subscribe(frames[0][1:])

    def _bind(self, channel: str, kind: int) -> "zmq.Socket[bytes]":
        context = self._heartbeat_context if channel == "hb" else self._context
        socket = context.socket(kind)
        socket.linger = _SEND_LINGER_MS
        if kind == zmq.ROUTER:
            # A client that reconnects with its old identity takes it over
            # (https://github.com/ipython/ipykernel/issues/270).
            socket.router_handover = 1
        else:
            # Each subscriber is told, not only the first one of a topic, so that each gets its iopub_welcome.
            socket.xpub_verbose = 1
        if self.info.curve_secretkey:
            socket.curve_secretkey = self.info.curve_secretkey.encode("ascii")
            socket.curve_publickey = self.info.curve_publickey.encode("ascii")
            socket.curve_server = True
        try:
            self._bind_to_port(socket, channel)
        except zmq.ZMQError as error:
            url = self.info.url(channel)
            socket.close()
            raise HostError(f"The kernel cannot listen on {url} ({channel}): {error}.") from error
        return socket

    def _bind_to_port(self, socket: "zmq.Socket[bytes]", channel: str) -> None:
        if (listening := self._listening.pop(channel, None)) is not None:
            socket.setsockopt(zmq.USE_FD, listening.detach())
        if self.info.port(channel):
            socket.bind(self.info.url(channel))
        elif self.info.transport == "tcp":
            socket.bind(f"tcp://{self.info.ip}:*")
            port = int(str(socket.getsockopt_string(zmq.LAST_ENDPOINT)).rpartition(":")[2])
            self.info = self.info.with_port(channel, port)
        else:
            # Binding to a path that another process uses would take it away silently, so look first.
            taken = set(self.info.ports().values())
            port = next(n for n in range(1, 65536) if n not in taken and not Path(f"{self.info.ip}-{n}").exists())
            self.info = self.info.with_port(channel, port)
            socket.bind(self.info.url(channel))


def _beat(socket: "zmq.Socket[bytes]") -> None:
    """Send every heartbeat back, inside libzmq, until the context ends."""
    while True:
        try:
            zmq.proxy(socket, socket)
        except zmq.ContextTerminated:
            socket.close(linger=0)
            return
        except zmq.ZMQError as error:
            # A signal ends the proxy; the kernel's signals are not the heartbeat's business.
            if error.errno != errno.EINTR:
                raise
