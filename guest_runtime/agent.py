"""The agent: one loop that serves the host's connection, answers JSON-RPC calls and relays the Python kernel's messages.

It outlives any error of one connection, and the newest authenticated host is the one that counts. Calls that may take a while run in
threads and hand their answer back to the loop. No timers: an idle machine costs nothing. Needs pyzmq, which ipykernel brings.
"""

import contextlib
import gc
import json
import os
import queue
import select
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from guest_runtime import methods, pipes, powers, rpc, warm_up
from guest_runtime.bridge import MAX_QUEUED, Bridge
from guest_runtime.handshake import GuestHandshake, SessionLost, SessionStarted
from guest_runtime.kernel import PythonKernel
from guest_runtime.mux import Message, Mux
from guest_runtime.pipes import Pipe
from guest_runtime.wire import Channel

RUN = Path("/run/agentvm")
USER = "notebook"
VSOCK_PORT = 5005
MAX_PIPES = 16
WARM_UP_WAIT_S = 2.0
WARM_UP_TRIES = 30

MakeKernel = Callable[[Callable[[Path], None], Callable[[dict[str, Any]], None]], PythonKernel]


class _Workers:
    """Threads that run tasks which may take a while; one that is done waits for the next task.

    A thawed machine would need longer to make a thread than for most of these tasks.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)

    def run(self, task: Callable[[], None]) -> None:
        """Have a thread run something that raises nothing."""
        self._tasks.put(task)
        if not self._idle.acquire(blocking=False):
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self._tasks.get()()
            self._idle.release()


class Agent:
    """The loop and everything that it serves.

    Args:
        secret: what the host has to know.
        make_kernel: makes the Python kernel to relay to, given whom to tell that it is up and that it ended; it is not started yet.

    Attributes:
        methods: by name; the owner may add some.
    """

    def __init__(self, secret: bytes, make_kernel: MakeKernel) -> None:
        self._secret = secret
        self._epoll = select.epoll()
        self._pipes: dict[int, Pipe] = {}
        self._watched: dict[int, Callable[[], None]] = {}
        self._mux: Mux | None = None
        self._mux_pipe: Pipe | None = None
        self._bridge: Bridge | None = None
        self._up = False
        self._early: list[tuple[Mux, Message]] = []  # came before the kernel was up
        self._when_sent: list[tuple[int, Callable[[], None]]] = []
        self._workers = _Workers()
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.watch(self._wake_read, self._on_wake)
        self.kernel = make_kernel(self._on_kernel_up, self._on_kernel_ended)
        method = rpc.Method
        self.methods: dict[str, rpc.Method] = {
            "ping": method(methods.ping),
            "info": method(methods.info),
            "system": method(methods.system),
            "network": method(methods.network),
            "disks": method(methods.disks, slow=True),
            "quiesce": method(self.quiesce, slow=True),
            "kernel.start": method(self.kernel.start, slow=True),
            "kernel.wait": method(self.kernel.wait, slow=True),
            "kernel.status": method(self.kernel.status),
            "kernel.interrupt": method(self.kernel.interrupt),
            "kernel.restart": method(self.kernel.restart, slow=True),
            "kernel.warm_up": method(self.warm_up, slow=True),
        }

    # ---- where hosts come in

    def add_port(self, fd: int) -> None:
        """Serve hosts on a virtio-serial port."""
        self._pipes[fd] = Pipe(fd, self._epoll, self._make_link(), lasting=True)

    def add_listener(self, listener: socket.socket) -> None:
        """Serve hosts that connect to a listening socket."""
        self.watch(listener.fileno(), lambda: self._accept(listener))

    def watch(self, fd: int, on_event: Callable[[], None]) -> None:
        """Call something whenever a descriptor becomes readable; it has to read until nothing is left."""
        self._watched[fd] = on_event
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)

    def set_secret(self, secret: bytes) -> None:
        """Require another secret from the next handshake on."""
        self._secret = secret
        for pipe in list(self._pipes.values()):
            pipe.link.secret = secret

    def _make_link(self) -> GuestHandshake:
        return GuestHandshake(self._secret, methods.info)

    def _accept(self, listener: socket.socket) -> None:
        while (pipe := pipes.accept(listener, self._epoll, self._make_link)) is not None:
            self._pipes[pipe.fd] = pipe
            # Anybody on the host may connect and say nothing: the oldest of those makes room.
            silent = [other for other in self._pipes.values() if not other.lasting and other is not self._mux_pipe]
            if len(silent) > MAX_PIPES:
                self._drop(silent[0])

    def _drop(self, pipe: Pipe) -> None:
        self._pipes.pop(pipe.fd, None)
        pipe.close()
        if self._mux_pipe is pipe:
            self._lose_host()

    def _lose_host(self) -> None:
        self._mux = self._mux_pipe = None
        self._early.clear()

    # ---- the loop

    def run(self) -> None:
        """Serve for ever."""
        poller = zmq.Poller()
        poller.register(self._epoll.fileno(), zmq.POLLIN)
        relayed: set[zmq.Socket[bytes]] = set()
        while True:
            wanted = self._wanted_sockets()
            if wanted != relayed:
                for gone in relayed - wanted:
                    poller.unregister(gone)
                for new in wanted - relayed:
                    poller.register(new, zmq.POLLIN)
                relayed = wanted
            busy = any(pipe.sendable or pipe.readable for pipe in self._pipes.values())
            for source, _ in poller.poll(0 if busy else None):
                if isinstance(source, int):
                    self._on_descriptors()
                elif self._bridge is not None and source in self._bridge.sockets:
                    self._guarded(self._bridge.from_kernel, source, self._queued)
            for pipe in list(self._pipes.values()):
                if pipe.readable:
                    self._read(pipe)
                if pipe.sendable:
                    pipe.write()
                if not pipe.open:
                    self._drop(pipe)
            if self._when_sent:
                self._tell_sent()

    def _wanted_sockets(self) -> "set[zmq.Socket[bytes]]":
        """The kernel's sockets to read from: not those whose output the host does not take fast enough."""
        if self._bridge is None or (self._mux is None and not self._bridge.probing):
            return set()
        return {socket for socket, channel in self._bridge.sockets.items() if self._queued(channel) < MAX_QUEUED}

    def _on_descriptors(self) -> None:
        for fd, _ in self._epoll.poll(0):
            if fd in self._pipes:
                self._pipes[fd].on_event()
            elif fd in self._watched:
                self._watched[fd]()

    def _read(self, pipe: Pipe) -> None:
        for event in pipe.read():
            if isinstance(event, Message):
                if pipe is self._mux_pipe and self._mux is not None:
                    self._guarded(self._on_message, self._mux, event)
            elif isinstance(event, SessionStarted):
                self._on_session(pipe, event.mux)
            elif isinstance(event, SessionLost) and pipe is self._mux_pipe:
                self._lose_host()

    def _on_session(self, pipe: Pipe, mux: Mux) -> None:
        before = self._mux_pipe
        self._lose_host()
        self._mux, self._mux_pipe = mux, pipe
        if before is not None and before is not pipe:
            before.link.end_session("another host took over")
            if not before.lasting:
                self._drop(before)

    def _on_message(self, mux: Mux, message: Message) -> None:
        if message.channel == Channel.RPC:
            self._call(mux, message.parts[0])
        elif self._up and self._bridge is not None:
            self._bridge.to_kernel(message.channel, message.parts)
        else:
            # No credit is given back meanwhile, so it is never much.
            self._early.append((mux, message))
            return
        mux.consumed(message.channel, message.size)

    def _guarded(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call something that one bad message must not let fail: the agent is the only way to this machine."""
        try:
            function(*arguments)
        except Exception:
            traceback.print_exc(file=sys.stderr)

    def call_soon(self, task: Callable[[], None]) -> None:
        """Have the loop call something, from any thread."""
        self._tasks.put(task)
        with contextlib.suppress(BlockingIOError):  # full of wake-ups
            os.write(self._wake_write, b".")

    def _on_wake(self) -> None:
        try:
            while os.read(self._wake_read, 4096):
                pass
        except BlockingIOError:
            pass
        while not self._tasks.empty():
            self._guarded(self._tasks.get())

    # ---- calls

    def _call(self, mux: Mux, part: bytes) -> None:
        call = rpc.parse(part, self.methods)
        if not isinstance(call, rpc.Call):
            self._answer(mux, call)
        elif call.method.slow:
            self._workers.run(lambda: self._run_slow(mux, call))
        else:
            self._answer(mux, call.run())

    def _run_slow(self, mux: Mux, call: rpc.Call) -> None:
        answer = call.run()
        self.call_soon(lambda: self._answer(mux, answer))

    def _answer(self, mux: Mux, answer: bytes | None) -> None:
        if answer is not None and mux is self._mux:
            mux.send(Channel.RPC, [answer])

    def when_sent(self, channel: int, then: Callable[[], None]) -> None:
        """Call something once all that waits for the host on a channel is on its way; at once when there is no host."""
        self._when_sent.append((channel, then))

    def _tell_sent(self) -> None:
        waiting, self._when_sent = self._when_sent, []
        for channel, then in waiting:
            if self._queued(channel) or (self._mux_pipe is not None and self._mux_pipe.unsent):
                self._when_sent.append((channel, then))
            else:
                self._guarded(then)

    def quiesce(self, timeout_s: float = 5.0) -> dict[str, Any]:
        """Confirm that no cell runs and that the host has all output; cells on subshells are the host's to wait for.

        Args:
            timeout_s: how long a running cell may take.

        Raises:
            RpcError: a cell is running (code -32001), or there is no kernel.
        """
        self.kernel.wait()
        idle, sent = threading.Event(), threading.Event()

        def ask() -> None:
            if self._bridge is not None:
                self._bridge.probe(idle.set)

        self.call_soon(ask)
        if not idle.wait(timeout_s):
            raise rpc.RpcError(f"a cell was still running after {timeout_s:g} s", code=rpc.BUSY)
        self.call_soon(lambda: self.when_sent(Channel.IOPUB, sent.set))
        if not sent.wait(timeout_s):
            raise rpc.RpcError(f"the host did not take all output within {timeout_s:g} s", code=rpc.BUSY)
        return {"quiet": True}

    def warm_up(self, timeout_s: float = 30.0, everything: bool = False) -> dict[str, Any]:
        """Have the Python kernel run something, so that a thawed machine's first cell finds its pages and its code in place.

        Args:
            timeout_s: how long that may take.
            everything: complete, inspect, fail and draw too, which is worth it for a template.

        Raises:
            RpcError: it takes longer (code -32001), or there is no kernel.
        """
        self.kernel.wait()
        warm = threading.Event()

        def run() -> None:
            if self._bridge is not None:
                for request in warm_up.EVERYTHING if everything else ():
                    self._bridge.probe(lambda: None, request)
                self._bridge.probe(warm.set, warm_up.RUN)

        self.call_soon(run)
        if not warm.wait(timeout_s):
            raise rpc.RpcError(f"nothing ran within {timeout_s:g} s", code=rpc.BUSY)
        return {"warm": True}

    # ---- the Python kernel

    def _on_kernel_up(self, folder: Path) -> None:
        """Connect to a new kernel and see it run something; in a thread of the kernel's."""
        warm = threading.Event()
        self.call_soon(lambda: self._connect(folder))
        for _ in range(WARM_UP_TRIES):
            self.call_soon(lambda: self._warm_up(warm))
            if warm.wait(WARM_UP_WAIT_S):
                return
        print("agentvm: the Python kernel takes requests, but does not run anything", file=sys.stderr)

    def _connect(self, folder: Path) -> None:
        if self._bridge is not None:
            self._bridge.close()
        self._bridge = Bridge(folder, self._send)

    def _warm_up(self, warm: threading.Event) -> None:
        def done() -> None:
            self._up = True
            early, self._early = self._early, []
            for mux, message in early:
                self._on_message(mux, message)
            warm.set()

        if self._bridge is not None:
            self._bridge.probe(done, warm_up.RUN)

    def _on_kernel_ended(self, how: dict[str, Any]) -> None:
        def tell() -> None:
            if self._mux is not None:
                self._mux.send(Channel.RPC, [rpc.notification("kernel.died", how)])

        self.call_soon(tell)

    def _send(self, channel: int, parts: list[bytes]) -> None:
        if self._mux is not None:
            self._mux.send(channel, parts)

    def _queued(self, channel: int) -> int:
        return self._mux.queued_bytes(channel) if self._mux is not None else 0


def main() -> None:
    """Run as the agent of a virtual machine."""
    boot = json.loads((RUN / "boot.json").read_text())
    agent = Agent(
        (RUN / "secret").read_bytes(),
        lambda on_up, on_ended: PythonKernel(
            RUN / "kernel",
            boot.get("preload", ()),
            boot.get("user", USER),
            on_up=on_up,
            on_ended=on_ended,
            restarts=boot.get("restart_kernel", False),
        ),
    )
    agent.methods |= powers.Powers(agent).methods()
    port = pipes.open_virtio_port()
    if port is not None:
        agent.add_port(port)
    listener = pipes.listen_vsock(boot.get("port", VSOCK_PORT))
    if listener is not None:
        agent.add_listener(listener)
    if port is None and listener is None:
        sys.exit("agentvm: this machine has neither a virtio-serial port nor vsock, so no host can reach it")
    if boot.get("kernel", True):
        agent.kernel.start()
    gc.collect()
    gc.freeze()  # nothing of it goes away again, and untouched pages stay shared by all clones
    agent.run()


if __name__ == "__main__":
    main()
