"""How fast the transport is by itself: `python benchmarks/transport.py`.

The guest's end runs in a process of its own on a unix socket, the real handshake and mux behind a poll loop; this
process has the host's end. Prints, and `measure()` returns, MB/s in both directions, round trips a second of small
messages and of calls, and the mux's own cost a message without any socket.
"""

import asyncio
import multiprocessing
import os
import select
import socket
import tempfile
import time
from pathlib import Path

from agentvm_kernel.transport.address import UnixAddress
from agentvm_kernel.transport.connection import GuestConnection, open_connection
from guest_runtime import wire
from guest_runtime.handshake import GuestHandshake, SessionStarted
from guest_runtime.mux import Message, Mux
from guest_runtime.wire import Channel

SECRET = bytes(32)
SMALL = [b'{"msg_id":"0123456789abcdef","msg_type":"execute_request"}', b"{}", b"{}", b'{"code":"1+1"}']
BLOCK = [b"header", bytes(100_000)]


def serve(listener: socket.socket) -> None:
    """The guest's end: echoes SHELL, answers calls, sends BLOCK on IOPUB as often as a call asks for."""
    client, _ = listener.accept()
    client.setblocking(False)
    link = GuestHandshake(SECRET, dict)
    mux = Mux()
    unsent: list[bytes | memoryview] = []
    blocks = 0
    poller = select.poll()
    while True:
        while blocks and mux.queued_bytes(Channel.IOPUB) < wire.WINDOW:
            mux.send(Channel.IOPUB, BLOCK)
            blocks -= 1
        poller.register(client, select.POLLIN | (select.POLLOUT if unsent or link.writable else 0))
        ((_, happened),) = poller.poll()
        if happened & select.POLLIN:
            data = client.recv(262144)
            if not data:
                return
            for event in link.feed(data):
                if isinstance(event, SessionStarted):
                    mux = event.mux
                if not isinstance(event, Message):
                    continue
                if event.channel == Channel.RPC:
                    request = wire.load_json(event.parts[0])
                    blocks += request.get("params", 0)
                    answer = {"jsonrpc": "2.0", "id": request["id"], "result": None}
                    mux.send(Channel.RPC, [wire.dump_json(answer)])
                elif len(event.parts) == len(SMALL):
                    mux.send(event.channel, event.parts)
                else:
                    mux.send(event.channel, [b"got it"])
                mux.consumed(event.channel, event.size)
        unsent = unsent or link.data_to_send()
        if unsent:
            try:
                sent = client.sendmsg(unsent)
            except BlockingIOError:
                continue
            while unsent and sent >= len(unsent[0]):
                sent -= len(unsent.pop(0))
            if sent:
                unsent[0] = memoryview(unsent[0])[sent:]


class Replies:
    """Counts messages of a channel and lets one wait for them."""

    def __init__(self, connection: GuestConnection, channel: int) -> None:
        self._count = asyncio.Semaphore(0)
        connection.on_message[channel] = lambda parts: self._count.release()

    async def wait(self, count: int) -> None:
        for _ in range(count):
            await self._count.acquire()


async def _measure_connection(path: Path) -> dict[str, float]:
    connection = await open_connection(UnixAddress(path), SECRET, timeout_s=10)
    figures = {}

    shell = Replies(connection, Channel.SHELL)
    count = 5000
    started = time.perf_counter()
    for _ in range(count):
        connection.send(Channel.SHELL, SMALL)
        await shell.wait(1)
    figures["message_round_trips_per_s"] = count / (time.perf_counter() - started)

    started = time.perf_counter()
    for _ in range(count):
        await connection.call("ping")
    figures["call_round_trips_per_s"] = count / (time.perf_counter() - started)

    count = 3000
    iopub = Replies(connection, Channel.IOPUB)
    started = time.perf_counter()
    await connection.call("flood", count)
    await iopub.wait(count)
    figures["guest_to_host_mb_per_s"] = count * len(BLOCK[1]) / (time.perf_counter() - started) / 1e6

    started = time.perf_counter()
    for _ in range(count):
        connection.send(Channel.SHELL, BLOCK)
    await shell.wait(count)
    figures["host_to_guest_mb_per_s"] = count * len(BLOCK[1]) / (time.perf_counter() - started) / 1e6
    await connection.close()
    return figures


def _measure_mux() -> dict[str, float]:
    sender, receiver = Mux(), Mux()
    count = 20_000
    started = time.perf_counter()
    for _ in range(count):
        sender.send(Channel.SHELL, SMALL)
        for message in receiver.receive(sender.data_to_send()[0]):
            receiver.consumed(message.channel, message.size)
        if receiver.writable:
            for frame in receiver.data_to_send():
                sender.receive(frame)
    return {"mux_us_per_message": (time.perf_counter() - started) / count * 1e6}


def measure() -> dict[str, float]:
    """Run everything once, in some five seconds, and return the figures by name."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder) / "guest.sock"
        listener.bind(os.fspath(path))
        listener.listen()
        guest = multiprocessing.get_context("fork").Process(target=serve, args=(listener,), daemon=True)
        guest.start()
        try:
            return {**_measure_mux(), **asyncio.run(_measure_connection(path))}
        finally:
            guest.terminate()
            guest.join()


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{name:28} {value:12,.1f}")
