"""The guest's end of a connection in a thread: the real handshake and mux on a socket, and some JSON-RPC methods."""

import contextlib
import os
import selectors
import socket
import threading

from guest_runtime import wire
from guest_runtime.handshake import GuestHandshake, SessionLost, SessionStarted
from guest_runtime.mux import Mux
from guest_runtime.wire import Channel

SECRET = bytes(range(32))


class GuestEnd:
    """Serves one client after another on a listening socket.

    Args:
        listener: bound and listening.
        secret: that the guest knows.
        serial: like a virtio-serial port: one endless stream, in which clients come and go unnoticed. Otherwise like
            vsock: each connection starts afresh.
    """

    def __init__(self, listener: socket.socket, secret: bytes = SECRET, *, serial: bool = False) -> None:
        self.listener = listener
        self.secret = secret
        self.serial = serial
        self.link = self._new_link()
        self.mux: Mux | None = None
        self.events: list[object] = []
        self.flood_left = 0
        self.flood_part = b""
        self.unsent: list[bytes | memoryview] = []
        self.received: list[tuple[int, list[bytes]]] = []
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _new_link(self) -> GuestHandshake:
        return GuestHandshake(self.secret, lambda: {"runtime": "test", "pid": os.getpid()})

    def __enter__(self) -> "GuestEnd":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wake.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.listener.close()
        self._woken.close()

    def _run(self) -> None:
        while True:
            with selectors.DefaultSelector() as selector:
                selector.register(self.listener, selectors.EVENT_READ)
                selector.register(self._woken, selectors.EVENT_READ)
                if any(key.fileobj is self._woken for key, _ in selector.select()):
                    return
            client, _ = self.listener.accept()
            if not self.serial:
                self.link = self._new_link()
                self.mux = None
            with client, contextlib.suppress(ConnectionError):
                if self._serve(client):
                    return

    def _serve(self, client: socket.socket) -> bool:
        client.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            selector.register(client, selectors.EVENT_READ)
            while True:
                self._refill()
                writing = bool(self.unsent) or self.link.writable
                selector.modify(client, selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0))
                for key, mask in selector.select():
                    if key.fileobj is self._woken:
                        return True
                    if mask & selectors.EVENT_READ:
                        data = client.recv(262144)
                        if not data:
                            if not self.serial:
                                self.unsent = []
                            return False
                        self._handle(data)
                    if mask & selectors.EVENT_WRITE:
                        self._write(client)

    def _write(self, client: socket.socket) -> None:
        self.unsent = self.unsent or self.link.data_to_send(65536)
        with contextlib.suppress(BlockingIOError):
            sent = client.sendmsg(self.unsent[:512])
            while sent:
                head = self.unsent[0]
                if sent < len(head):
                    self.unsent[0] = memoryview(head)[sent:]
                    break
                sent -= len(head)
                self.unsent.pop(0)

    def _handle(self, data: bytes) -> None:
        for event in self.link.feed(data):
            if isinstance(event, SessionStarted | SessionLost):
                self.events.append(event)
                self.mux = event.mux if isinstance(event, SessionStarted) else None
                continue
            if event.channel == Channel.RPC:
                self._call(wire.load_json(event.parts[0]))
            else:
                self.received.append((event.channel, event.parts))
                self.mux.send(event.channel, event.parts)  # echo
            self.mux.consumed(event.channel, event.size)

    def _call(self, request: dict) -> None:
        answer = {"jsonrpc": "2.0", "id": request["id"]}
        params = request.get("params")
        match request["method"]:
            case "ping":
                answer["result"] = params
            case "fail":
                answer["error"] = {"code": -32000, "message": "it failed", "data": params}
            case "silent":
                return
            case "notify":
                self.mux.send(Channel.RPC, [wire.dump_json({"jsonrpc": "2.0", "method": "event", "params": params})])
                answer["result"] = None
            case "raw":  # send whatever the test wants, outside all rules
                self.unsent += [*self.link.data_to_send(1 << 30), bytes.fromhex(params)]
                return
            case "raw_rpc":
                self.mux.send(Channel.RPC, [bytes.fromhex(params)])
                return
            case "close":
                self.mux.close("guest shuts down")
                return
            case "flood":
                self.flood_left = params["count"]
                self.flood_part = bytes(params["size"])
                answer["result"] = None
        self.mux.send(Channel.RPC, [wire.dump_json(answer)])

    def _refill(self) -> None:
        """Keep some of the flood queued, as the agent does."""
        mux = self.mux
        while mux is not None and self.flood_left and mux.queued_bytes(Channel.IOPUB) < 1 << 20:
            mux.send(Channel.IOPUB, [b"header", self.flood_part])
            self.flood_left -= 1
