"""The host's connection over real sockets, against the real guest's end in a thread."""

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_end import SECRET, GuestEnd

from agentvm_kernel.errors import (
    AuthenticationError,
    ConnectionClosed,
    FrameError,
    GuestError,
    MachineTimeout,
    TransportError,
)
from agentvm_kernel.transport import connection as connection_module
from agentvm_kernel.transport.address import Address, UnixAddress, VsockAddress
from agentvm_kernel.transport.connection import GuestConnection, open_connection
from agentvm_kernel.transport.host import vsock_available, vsock_loopback_available, vsock_problem
from guest_runtime import wire
from guest_runtime.handshake import SessionLost, SessionStarted
from guest_runtime.wire import WINDOW, Channel, FrameType


def listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "guest.sock"


@pytest.fixture
def guest(path: Path) -> Iterator[GuestEnd]:
    with GuestEnd(listen(path)) as end:
        yield end


@pytest.fixture
def serial_guest(path: Path) -> Iterator[GuestEnd]:
    with GuestEnd(listen(path), serial=True) as end:
        yield end


async def connect(path: Path, secret: bytes = SECRET) -> GuestConnection:
    return await open_connection(UnixAddress(path), secret, timeout_s=10)


async def check_all_ways(address: Address) -> None:
    """One connection used in every way."""
    connection = await open_connection(address, SECRET, timeout_s=10)
    assert connection.ready == {"runtime": "test", "pid": os.getpid()}
    assert await connection.call("ping", {"n": 1}) == {"n": 1}
    echoed: asyncio.Queue[list[bytes]] = asyncio.Queue()
    connection.on_message[Channel.SHELL] = echoed.put_nowait
    parts = [b"{}", b"", bytes(range(256)) * 20_000]
    connection.send(Channel.SHELL, parts)
    connection.send(Channel.SHELL, [b"next"])
    assert await echoed.get() == parts
    assert await echoed.get() == [b"next"]
    assert connection.queued_bytes(Channel.SHELL) == 0
    await connection.close()
    assert await connection.closed == "no longer needed"


async def test_messages_and_calls_over_a_unix_socket(guest, path):
    await check_all_ways(UnixAddress(path))


async def test_messages_and_calls_over_a_serial_port(serial_guest, path):
    await check_all_ways(UnixAddress(path))
    await check_all_ways(UnixAddress(path))


@pytest.mark.skipif(not vsock_loopback_available(), reason="the kernel module vsock_loopback is not usable here")
async def test_messages_and_calls_over_vsock():
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
    listener.listen()
    with GuestEnd(listener):
        await check_all_ways(VsockAddress(1, listener.getsockname()[1]))


async def test_vsock_to_a_machine_that_is_not_up_times_out():
    if not hasattr(socket, "AF_VSOCK"):
        pytest.skip("this Python has no AF_VSOCK")
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError as error:
        pytest.skip(f"no AF_VSOCK sockets here: {error}")
    with pytest.raises(MachineTimeout, match=r"vsock:54321:5005 .* 0\.3 s"):
        await open_connection(VsockAddress(54321, 5005), SECRET, timeout_s=0.3)


# Connecting


async def test_connecting_waits_for_the_socket_and_for_someone_listening(path):
    task = asyncio.create_task(connect(path))
    await asyncio.sleep(0.05)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))  # connections are refused from here on
    await asyncio.sleep(0.05)
    listener.listen()
    await asyncio.sleep(0.05)
    with GuestEnd(listener):
        connection = await task
        await connection.close()


async def test_hello_is_repeated_until_the_guest_reads(path):
    listener = listen(path)
    task = asyncio.create_task(connect(path))
    client, _ = await asyncio.to_thread(listener.accept)
    with client:  # takes the connection and loses what was said, as a port that was just opened may do
        await asyncio.to_thread(client.recv, 62)
        hello = await asyncio.to_thread(client.recv, 1000)
        assert hello.startswith(wire.MAGIC)
    with GuestEnd(listener):  # the connection died: the host connects again
        connection = await task
        await connection.close()


async def test_handshake_begins_again_when_the_agent_was_restarted_in_the_middle(path, monkeypatch):
    monkeypatch.setattr(connection_module, "READY_TIMEOUT_S", 0.3)
    listener = listen(path)
    with GuestEnd(listener) as guest:
        start = guest.link._start
        guest.serial = True
        guest.link._start = lambda: setattr(guest.link, "_start", start) or []  # the first PROOF goes nowhere
        connection = await connect(path)
        assert await connection.call("ping") is None
        await connection.close()


async def test_silence_times_out(path):
    with listen(path), pytest.raises(MachineTimeout, match="silent"):
        await open_connection(UnixAddress(path), SECRET, timeout_s=0.3)


async def test_no_socket_times_out_and_says_why(path):
    with pytest.raises(MachineTimeout, match="No such file"):
        await open_connection(UnixAddress(path), SECRET, timeout_s=0.1)


async def test_an_address_that_cannot_work_fails_at_once(path):
    with pytest.raises(TransportError, match="too long"):
        await open_connection(UnixAddress(path / ("x" * 200)), SECRET, timeout_s=60)
    with pytest.raises(TransportError, match="Not a directory"):
        await open_connection(UnixAddress(Path("/dev/null/socket")), SECRET, timeout_s=60)


async def test_cancelled_while_connecting(path):
    with listen(path) as listener:
        task = asyncio.create_task(connect(path))
        client, _ = await asyncio.to_thread(listener.accept)
        with client:
            assert await asyncio.to_thread(client.recv, 1000)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while await asyncio.to_thread(client.recv, 1000):
                pass


# Trust


async def test_wrong_secret_of_the_guest(path):
    with GuestEnd(listen(path), secret=b"a secret of another lease") as guest:
        with pytest.raises(AuthenticationError, match="secret"):
            await connect(path)
        connection = await connect(path, b"a secret of another lease")  # it keeps serving
        await connection.close()
        assert guest.events[0] == SessionStarted(guest.events[0].mux)


async def test_wrong_secret_of_the_host_is_refused_and_the_guest_serves_on(serial_guest, path, monkeypatch):
    serial_guest.secret = SECRET

    def flattered(*_: object) -> bytes:
        """A host that does not check the guest and shows the wrong proof."""
        return wire.MAGIC + wire.frame(FrameType.PROOF, 0, bytes(32))

    with monkeypatch.context() as patch:
        patch.setattr(connection_module.HostHandshake, "_prove", flattered)
        with pytest.raises(AuthenticationError, match="refused"):
            await connect(path)
    connection = await connect(path)
    assert await connection.call("ping", 1) == 1
    await connection.close()


HOSTILE = {
    "garbage": os.urandom(64),
    "huge frame": wire.HEADER.pack(FrameType.DATA, 0, 5, 0xFFFFFFFF, 0),
    "no channel": wire.frame(FrameType.DATA, 77, wire.encode_message([b"x"])),
    "beyond the credit": wire.frame(FrameType.DATA, 4, wire.encode_message([bytes(60_000)])) * 20,
    "hello": wire.MAGIC + wire.frame(FrameType.HELLO, 0, bytes(34)),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
async def test_hostile_bytes_end_the_connection(guest, path, data):
    connection = await connect(path)
    pending = asyncio.create_task(connection.call("silent"))
    with pytest.raises(FrameError, match="broke the protocol"):
        await connection.call("raw", data.hex())
    with pytest.raises(FrameError):
        await pending
    assert connection.closed.done()
    with pytest.raises(ConnectionClosed):
        connection.send(Channel.SHELL, [b"x"])


@pytest.mark.parametrize(
    "answer",
    [
        b"[]",
        b"not JSON",
        b"{}",
        b'{"jsonrpc":"2.0","id":99,"result":1}',
        b'{"jsonrpc":"2.0","id":true,"result":1}',
        b'{"jsonrpc":"2.0","id":1}',
        b'{"jsonrpc":"2.0","id":1,"result":1,"error":{"code":1,"message":""}}',
        b'{"jsonrpc":"2.0","id":7,"method":"call_the_host"}',
        b'{"jsonrpc":"2.0","id":1,"error":"text"}',
        b'{"jsonrpc":"2.0","id":1,"error":{"code":"1","message":"x"}}',
        b'{"a":' * 65 + b"1" + b"}" * 65,
    ],
)
async def test_answers_that_are_not_json_rpc_are_refused(guest, path, answer):
    connection = await connect(path)
    with pytest.raises(FrameError):
        await connection.call("raw_rpc", answer.hex())
    await connection.close()


# Calls


async def test_errors_of_the_guest(guest, path):
    connection = await connect(path)
    with pytest.raises(GuestError, match="it failed") as caught:
        await connection.call("fail", {"why": "test"})
    assert (caught.value.code, caught.value.data) == (-32000, {"why": "test"})
    await connection.close()


async def test_a_call_that_is_not_answered_times_out_and_the_connection_lives(guest, path):
    connection = await connect(path)
    with pytest.raises(MachineTimeout, match=r"silent in 0\.05 s"):
        await connection.call("silent", timeout_s=0.05)
    assert await connection.call("ping", 2, timeout_s=None) == 2
    await connection.close()


async def test_many_calls_at_once(guest, path):
    connection = await connect(path)
    assert await asyncio.gather(*(connection.call("ping", n) for n in range(200))) == list(range(200))
    await connection.close()


async def test_notifications(guest, path):
    connection = await connect(path)
    await connection.call("notify", 1)  # nobody listens
    heard = []
    connection.on_notification = lambda method, params: heard.append((method, params))
    await connection.call("notify", {"exit_code": 1})
    assert heard == [("event", {"exit_code": 1})]
    await connection.close()


async def test_pending_calls_fail_when_the_guest_goes(path):
    with GuestEnd(listen(path)):
        connection = await connect(path)
        pending = asyncio.create_task(connection.call("silent"))
        await connection.call("ping")
    with pytest.raises(ConnectionClosed, match="ended"):
        await pending
    assert "closed" in await connection.closed
    await connection.close()


async def test_pending_calls_fail_on_close(guest, path):
    connection = await connect(path)
    pending = asyncio.create_task(connection.call("silent"))
    await connection.call("ping")
    await connection.close("notebook shut down")
    with pytest.raises(ConnectionClosed, match="notebook shut down"):
        await pending
    assert await connection.closed == "notebook shut down"
    await connection.close()
    with pytest.raises(ConnectionClosed):
        await connection.call("ping")
    with pytest.raises(ConnectionClosed):
        connection.queued_bytes(Channel.SHELL)


async def test_the_guest_may_close(guest, path):
    connection = await connect(path)
    with pytest.raises(ConnectionClosed, match="guest shuts down"):
        await connection.call("close")
    assert await connection.closed == "closed by the guest: guest shuts down"


# Messages


async def test_messages_wait_for_their_callback(guest, path):
    connection = await connect(path)
    for n in range(3):
        connection.send(Channel.SHELL, [b"%d" % n])
    await connection.call("ping")
    await connection.call("ping")
    got: list[bytes] = []
    everything = asyncio.Event()

    def callback(parts: list[bytes]) -> None:
        got.extend(parts)
        if len(got) == 3:
            everything.set()

    connection.on_message[Channel.SHELL] = callback
    await asyncio.wait_for(everything.wait(), 5)
    assert got == [b"0", b"1", b"2"]
    await connection.close()


async def test_a_failing_callback_is_reported_and_does_not_end_the_connection(guest, path):
    reports: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    connection = await connect(path)

    def fail(*_: object) -> None:
        raise RuntimeError("the owner's bug")

    connection.on_message[Channel.SHELL] = connection.on_notification = fail
    connection.send(Channel.SHELL, [b"x"])
    await connection.call("notify")
    await connection.call("ping")
    assert [str(report["exception"]) for report in reports] == ["the owner's bug"] * 2
    await connection.close()


async def test_too_much_is_refused_before_it_is_sent(guest, path):
    connection = await connect(path)
    with pytest.raises(ValueError, match="too big"):
        connection.send(Channel.RPC, [bytes(wire.MAX_RPC_MESSAGE)])
    with pytest.raises(ValueError, match="not open"):
        connection.send(33, [b"x"])
    assert await connection.call("ping", 1) == 1
    await connection.close()


async def test_byte_stream_channels(guest, path):
    connection = await connect(path)
    await connection.call("ping")
    guest.mux.open_channel(16)
    connection.open_channel(16)
    echoed: asyncio.Queue[list[bytes]] = asyncio.Queue()
    connection.on_message[16] = echoed.put_nowait
    connection.send(16, [b"block"])
    assert await echoed.get() == [b"block"]
    connection.close_channel(16)
    with pytest.raises(ValueError, match="not open"):
        connection.send(16, [b"x"])
    await connection.close()


# Flow control


async def test_a_flood_does_not_delay_calls(guest, path):
    """200 MB of output; calls are answered promptly all the time, and the guest never queues more than its window."""
    connection = await connect(path)
    got = 0
    done = asyncio.Event()
    total = 200_000_000

    def count(parts: list[bytes]) -> None:
        nonlocal got
        got += len(parts[1])
        if got == total:
            done.set()

    connection.on_message[Channel.IOPUB] = count
    await connection.call("flood", {"count": total // 50_000, "size": 50_000})
    waits = []
    while not done.is_set():
        started = time.perf_counter()
        await connection.call("ping")
        waits.append(time.perf_counter() - started)
    assert got == total
    assert len(waits) > 20
    assert sorted(waits)[len(waits) // 2] < 0.1
    assert max(waits) < 1
    await connection.close()


async def test_a_paused_channel_stops_the_guest_at_its_window_and_calls_go_on(guest, path):
    connection = await connect(path)
    sizes: list[int] = []
    everything = asyncio.Event()

    def count(parts: list[bytes]) -> None:
        sizes.append(len(parts[1]))
        if len(sizes) == 1000:
            everything.set()

    connection.on_message[Channel.IOPUB] = count
    connection.pause(Channel.IOPUB)
    await connection.call("flood", {"count": 1000, "size": 10_000})
    for n in range(50):
        assert await connection.call("ping", n) == n
    assert 0 < sum(sizes) <= WINDOW
    assert not connection._mux.writable
    before = len(sizes)
    connection.resume(Channel.IOPUB)
    await asyncio.wait_for(everything.wait(), 30)
    assert before < 1000 == len(sizes)
    await connection.close()


async def test_messages_without_a_callback_are_bounded_by_the_window(guest, path):
    connection = await connect(path)
    await connection.call("flood", {"count": 1000, "size": 10_000})
    for n in range(50):
        assert await connection.call("ping", n) == n
    assert sum(message.size for message in connection._waiting[Channel.IOPUB]) <= WINDOW
    everything = asyncio.Event()
    count = 0

    def callback(_: list[bytes]) -> None:
        nonlocal count
        count += 1
        if count == 1000:
            everything.set()

    connection.on_message[Channel.IOPUB] = callback
    await asyncio.wait_for(everything.wait(), 30)
    await connection.close()


async def test_a_big_message_to_a_slow_guest_does_not_delay_calls(guest, path):
    connection = await connect(path)
    echoed: asyncio.Queue[list[bytes]] = asyncio.Queue()
    connection.on_message[Channel.SHELL] = echoed.put_nowait
    big = os.urandom(30 << 20)
    connection.send(Channel.SHELL, [big])
    assert connection.queued_bytes(Channel.SHELL) > 20 << 20
    assert await connection.call("ping", 1, timeout_s=5) == 1
    assert connection.queued_bytes(Channel.SHELL) > 0
    assert (await echoed.get())[0] == big
    await connection.close()


# Hosts that come and go on a serial port


async def test_a_new_host_after_one_that_was_killed_inside_a_frame(serial_guest, path):
    first = await connect(path)
    first._mux.send(Channel.SHELL, [bytes(60_000)])
    frame = b"".join(first._mux.data_to_send())
    first._transport.write(frame[:30_000])
    first._transport.close()
    await first.closed
    second = await connect(path)
    assert await second.call("ping", 5) == 5
    assert [type(event) for event in serial_guest.events] == [SessionStarted, SessionLost, SessionStarted]
    assert serial_guest.received == []
    await second.close()


async def test_a_new_host_reads_what_the_guest_had_half_written(serial_guest, path):
    first = await connect(path)
    first.pause(Channel.IOPUB)
    await first.call("flood", {"count": 1_000_000, "size": 50_000})
    first._transport.abort()
    await first.closed
    serial_guest.flood_left = 0
    second = await connect(path)
    assert await second.call("ping", 5) == 5
    await second.close()


# The host


def test_vsock_of_this_host(tmp_path):
    missing = str(tmp_path / "vhost-vsock")
    assert "does not exist" in vsock_problem(missing)
    assert not vsock_available(missing)
    assert "cannot be opened" in vsock_problem(str(tmp_path))
    assert vsock_available() == (vsock_problem() == "")


def test_addresses_read_well():
    assert str(VsockAddress(3, 5005)) == "vsock:3:5005"
    assert str(UnixAddress(Path("/run/x.sock"))) == "unix:/run/x.sock"
