"""The agent: one loop that serves the host's connection, answers JSON-RPC calls and relays the Python kernel's messages.

It outlives any error of one connection, and the newest authenticated host is the one that counts. Calls that may take a while run in
threads and hand their answer back to the loop. Needs pyzmq, which ipykernel brings.
"""

import base64
import json
import os
import queue
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from guest_runtime import identity, methods, pipes, rpc
from guest_runtime.bridge import Bridge
from guest_runtime.handshake import GuestHandshake, SessionLost, SessionStarted
from guest_runtime.kernel import PythonKernel
from guest_runtime.mux import Message, Mux
from guest_runtime.pipes import Pipe
from guest_runtime.wire import Channel

RUN = Path("/run/agentvm")
USER = "notebook"
VSOCK_PORT = 5005
MAX_PIPES = 16
_EDGE = select.EPOLLIN | select.EPOLLOUT | select.EPOLLHUP | select.EPOLLET


class Agent:
    """The loop and everything that it serves.

    Args:
        secret: what the host has to know.
        make_kernel: makes the Python kernel to relay to, given whom to tell of its end; it is not started yet.

    Attributes:
        methods: by name; the owner may add some.
    """

    def __init__(self, secret: bytes, make_kernel: Callable[[Callable[[dict[str, Any]], None]], PythonKernel]) -> None:
        self._secret = secret
        self._epoll = select.epoll()
        self._pipes: dict[int, Pipe] = {}
        self._listeners: dict[int, socket.socket] = {}
        self._mux: Mux | None = None
        self._mux_pipe: Pipe | None = None
        self._done: queue.SimpleQueue[tuple[Mux | None, bytes]] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll.register(self._wake_read, select.EPOLLIN | select.EPOLLET)
        self.kernel = make_kernel(self._on_kernel_ended)
        self._bridge = Bridge(self.kernel.address, self._send, self._queued)
        method = rpc.Method
        self.methods: dict[str, rpc.Method] = {
            "ping": method(methods.ping),
            "info": method(methods.info),
            "system": method(methods.system),
            "network": method(methods.network),
            "disks": method(methods.disks, slow=True),
            "kernel.wait": method(self.kernel.wait, slow=True),
            "kernel.status": method(self.kernel.status),
            "kernel.interrupt": method(self.kernel.interrupt),
            "kernel.restart": method(self.kernel.restart, slow=True),
        }

    # ---- where hosts come in

    def add_port(self, fd: int) -> None:
        """Serve hosts on a virtio-serial port."""
        self._add_pipe(Pipe(fd, self._make_link(), lasting=True))

    def add_listener(self, listener: socket.socket) -> None:
        """Serve hosts that connect to a listening socket."""
        self._listeners[listener.fileno()] = listener
        self._epoll.register(listener.fileno(), select.EPOLLIN | select.EPOLLET)

    def set_secret(self, secret: bytes) -> None:
        """Require another secret from the next handshake on."""
        self._secret = secret
        for pipe in self._pipes.values():
            pipe.link.secret = secret

    def _make_link(self) -> GuestHandshake:
        return GuestHandshake(self._secret, methods.info)

    def _add_pipe(self, pipe: Pipe) -> None:
        self._pipes[pipe.fd] = pipe
        self._epoll.register(pipe.fd, _EDGE)

    # ---- the loop

    def run(self) -> None:
        """Serve for ever."""
        poller = zmq.Poller()
        watched: set[zmq.Socket[bytes]] = set()
        poller.register(self._epoll.fileno(), zmq.POLLIN)
        while True:
            wanted = set(self._bridge.sockets()) if self._mux is not None else set()
            for relayed in watched - wanted:
                poller.unregister(relayed)
            for relayed in wanted - watched:
                poller.register(relayed, zmq.POLLIN)
            watched = wanted
            busy = any(pipe.sendable or pipe.readable for pipe in self._pipes.values())
            for source, _ in poller.poll(0 if busy else None):
                if isinstance(source, int):
                    self._on_descriptors()
                else:
                    self._bridge.from_kernel(source)
            for pipe in list(self._pipes.values()):
                if pipe.readable:
                    self._read(pipe)
                if pipe.sendable:
                    pipe.write()
                if not pipe.open:
                    self._drop(pipe)

    def _on_descriptors(self) -> None:
        for fd, _ in self._epoll.poll(0):
            if fd == self._wake_read:
                self._on_wake()
            elif fd in self._listeners:
                while (pipe := pipes.accept(self._listeners[fd], self._make_link)) is not None:
                    self._add_pipe(pipe)
                    self._limit_pipes()
            elif fd in self._pipes:
                self._pipes[fd].on_event()

    def _limit_pipes(self) -> None:
        """Anybody on the host may connect and say nothing: the oldest of those makes room."""
        silent = [pipe for pipe in self._pipes.values() if not pipe.lasting and pipe is not self._mux_pipe]
        if len(silent) > MAX_PIPES:
            self._drop(silent[0])

    def _drop(self, pipe: Pipe) -> None:
        self._pipes.pop(pipe.fd, None)
        pipe.close()
        if self._mux_pipe is pipe:
            self._mux = self._mux_pipe = None

    def _read(self, pipe: Pipe) -> None:
        for event in pipe.read():
            if isinstance(event, Message):
                if pipe is self._mux_pipe and self._mux is not None:
                    self._on_message(self._mux, event)
            elif isinstance(event, SessionStarted):
                self._on_session(pipe, event.mux)
            elif isinstance(event, SessionLost) and pipe is self._mux_pipe:
                self._mux = self._mux_pipe = None

    def _on_session(self, pipe: Pipe, mux: Mux) -> None:
        before, self._mux, self._mux_pipe = self._mux_pipe, mux, pipe
        if before is not None and before is not pipe:
            before.link.end_session("another host took over")
            if not before.lasting:
                self._drop(before)

    def _on_message(self, mux: Mux, message: Message) -> None:
        if message.channel == Channel.RPC:
            self._call(mux, message.parts[0])
        else:
            self._bridge.to_kernel(message.channel, message.parts)
        mux.consumed(message.channel, message.size)

    # ---- calls

    def _call(self, mux: Mux, part: bytes) -> None:
        call = rpc.parse(part, self.methods)
        if isinstance(call, bytes):
            mux.send(Channel.RPC, [call])
        elif call.method.slow:
            threading.Thread(target=self._run_slow, args=(mux, call), daemon=True).start()
        elif (answer := call.run()) is not None:
            mux.send(Channel.RPC, [answer])

    def _run_slow(self, mux: Mux, call: rpc.Call) -> None:
        answer = call.run()
        if answer is not None:
            self._post(mux, answer)

    def _post(self, mux: Mux | None, answer: bytes) -> None:
        """Have the loop send something to the host, from any thread; None is whichever host is there."""
        self._done.put((mux, answer))
        os.write(self._wake_write, b".")

    def _on_wake(self) -> None:
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            return
        while not self._done.empty():
            mux, answer = self._done.get()
            if self._mux is not None and mux in (None, self._mux):
                self._mux.send(Channel.RPC, [answer])

    def _on_kernel_ended(self, how: dict[str, Any]) -> None:
        self._post(None, rpc.notification("kernel.died", how))

    def _send(self, channel: int, parts: list[bytes]) -> None:
        if self._mux is not None:
            self._mux.send(channel, parts)

    def _queued(self, channel: int) -> int:
        return self._mux.queued_bytes(channel) if self._mux is not None else 0


class Powers:
    """Methods that change the machine itself; only for an agent that runs as root in a machine of its own."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def renew(
        self, entropy: str, time_ns: int, hostname: str, machine_id: str, secret: str, reseed: bool
    ) -> dict[str, bool]:
        """Give the machine a new identity; answer only when every part of it holds."""
        seed = base64.b64decode(entropy, validate=True)
        new_secret = base64.b64decode(secret, validate=True)
        if len(seed) < 64 or len(new_secret) < 32:
            raise rpc.RpcError("too little entropy, or too short a secret", code=rpc.INVALID_PARAMS)
        # The first half is for the kernel alone: what Python is seeded with can be read by the user's code.
        half = len(seed) // 2
        identity.reseed_kernel(seed[:half])
        identity.set_clock(time_ns)
        identity.set_hostname(hostname)
        identity.set_machine_id(machine_id)
        identity.renew_boot_id()
        if reseed:
            self._agent.kernel.reseed(seed[half:])
        self._agent.set_secret(new_secret)
        confirmed = dict.fromkeys(("entropy", "time", "hostname", "machine_id", "boot_id", "secret"), True)
        return confirmed | {"reseed": reseed}

    def shutdown(self) -> dict[str, Any]:
        """Switch the machine off cleanly; PID 1 does it."""
        os.kill(1, signal.SIGTERM)
        return {}

    def reboot(self) -> dict[str, Any]:
        """Restart the machine cleanly; PID 1 does it."""
        os.kill(1, signal.SIGINT)
        return {}


def main() -> None:
    """Run as the agent of a virtual machine."""
    boot = json.loads((RUN / "boot.json").read_text())
    secret = (RUN / "secret").read_bytes()
    agent = Agent(secret, lambda on_ended: PythonKernel(RUN / "kernel", boot.get("preload", ()), USER, on_ended))
    powers = Powers(agent)
    agent.methods |= {
        "renew": rpc.Method(powers.renew, slow=True),
        "shutdown": rpc.Method(powers.shutdown),
        "reboot": rpc.Method(powers.reboot),
    }
    port = pipes.open_virtio_port()
    if port is not None:
        agent.add_port(port)
    listener = pipes.listen_vsock(VSOCK_PORT)
    if listener is not None:
        agent.add_listener(listener)
    if port is None and listener is None:
        sys.exit("agentvm: this machine has neither a virtio-serial port nor vsock, so no host can reach it")
    if boot.get("kernel", True):
        agent.kernel.start()
    agent.run()


if __name__ == "__main__":
    main()
