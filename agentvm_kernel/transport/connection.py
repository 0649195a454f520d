"""The host's end of the connection to one guest: messages by channel, and JSON-RPC calls, over vsock or virtio-serial.

Imports asyncio, the wire format and nothing heavy: the kernel process needs it before the first cell. It moves messages
and never looks into them, except for JSON-RPC 2.0 on the RPC channel. Everything runs in the event loop that called
`open_connection`; nothing here may be called from another thread.

    connection = await open_connection(VsockAddress(cid=42, port=5005), secret, timeout_s=10)
    connection.on_message[Channel.IOPUB] = lambda parts: ...
    await connection.call("ping")
    connection.send(Channel.SHELL, [header, parent, metadata, content])
    reason = await connection.closed

Flow control, both ways. Towards the guest `send` never blocks: look at `queued_bytes` before sending much. From the
guest, credit is given back when the callback returns, unless the owner has paused the channel; then at most the window
and one message follow. Messages of a channel that has no callback yet wait, without credit, until it gets one.

The guest is hostile: whatever it sends that is not valid ends the connection with a FrameError as the reason, and fails
the calls that are pending.
"""

import asyncio
import errno
import socket
from collections import UserDict
from collections.abc import Callable, Iterable
from typing import Any, Final

from agentvm_kernel.errors import (
    AuthenticationError,
    ConnectionClosed,
    FrameError,
    GuestError,
    MachineTimeout,
    TransportError,
)
from agentvm_kernel.log import get_logger
from agentvm_kernel.transport.address import Address, UnixAddress
from guest_runtime import wire
from guest_runtime.handshake import HostHandshake
from guest_runtime.mux import Message, Mux
from guest_runtime.wire import Channel

__all__ = ["GuestConnection", "open_connection"]

HELLO_INTERVAL_S: Final = 0.2
READY_TIMEOUT_S: Final = 5.0
"""After this long without READY the guest's runtime was probably restarted in between: begin the handshake again."""
RETRY_INTERVAL_S: Final = 0.02
WRITE_CHUNK: Final = 64 * 1024
"""What is handed to the socket at a time; an interrupt cannot overtake what was handed over."""
CLOSE_TIMEOUT_S: Final = 1.0

_NOT_UP_YET: Final = frozenset(
    {
        errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENODEV, errno.ETIMEDOUT, errno.EHOSTUNREACH,
        errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAGAIN, errno.EINTR, errno.EPIPE,
    }
)  # fmt: skip
"""Errors of connect that pass once the machine is up. vsock: no such CID yet ENODEV, nobody listens ECONNRESET."""

_log = get_logger(__name__)

MessageCallback = Callable[[list[bytes]], None]
NotificationCallback = Callable[[str, Any], None]


async def open_connection(address: Address, secret: bytes, *, timeout_s: float) -> "GuestConnection":
    """Connect to a guest and authenticate both ends, trying again until the guest is up.

    Args:
        address: where the guest listens.
        secret: the lease's secret, which the guest got at boot or when its identity was renewed.
        timeout_s: how long to go on trying, in seconds.

    Raises:
        AuthenticationError: the guest does not know the secret, or refused ours.
        FrameError: the guest does not keep to the protocol.
        MachineTimeout: no answer in time.
        TransportError: the address cannot be used at all.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    problem = "it is silent"
    while loop.time() < deadline:
        connection = GuestConnection(address, secret)
        try:
            async with asyncio.timeout_at(deadline):
                await connection._connect()
                await connection._greet()
            return connection
        except ConnectionClosed as error:
            problem = error.message
        except OSError as error:
            connection._end("given up")
            if error.errno in _NOT_UP_YET:
                problem = error.strerror or str(error)
            elif not isinstance(error, TimeoutError):  # which is what asyncio raises at the deadline, without errno
                raise TransportError(f"Cannot connect to the guest at {address}: {error.strerror or error}.") from error
        except BaseException:
            connection._end("given up")
            raise
        await asyncio.sleep(RETRY_INTERVAL_S)
    raise MachineTimeout(
        f"The guest at {address} did not answer within {timeout_s:g} s: {problem}.",
        hint="`agentvm logs` shows its console.",
    )


class _Callbacks(UserDict[int, MessageCallback]):
    """Callbacks by channel; setting one delivers what has waited for it."""

    def __init__(self, connection: "GuestConnection") -> None:
        super().__init__()
        self._connection = connection

    def __setitem__(self, channel: int, callback: MessageCallback) -> None:
        super().__setitem__(channel, callback)
        self._connection._deliver_waiting(channel)


class GuestConnection(asyncio.Protocol):
    """An authenticated connection; made by `open_connection`.

    Attributes:
        address: where the guest is.
        ready: what the guest told about itself (runtime version and so on).
        on_message: by channel, the callable that gets the parts of each message. Not for RPC.
        on_notification: gets method and params of JSON-RPC notifications; while it is None they are dropped.
        closed: resolved with the reason when the connection has ended, whoever ended it.
    """

    def __init__(self, address: Address, secret: bytes) -> None:
        self._loop = asyncio.get_running_loop()
        self.address = address
        self.ready: dict[str, Any] = {}
        self.on_message = _Callbacks(self)
        self.on_notification: NotificationCallback | None = None
        self.closed: asyncio.Future[str] = self._loop.create_future()
        self._handshake = HostHandshake(secret)
        self._established: asyncio.Future[None] = self._loop.create_future()
        self._mux: Mux | None = None
        self._transport: asyncio.Transport | None = None
        self._blocked = False  # the socket takes no more for now
        self._callbacks = self.on_message.data
        self._waiting: dict[int, list[Message]] = {}  # for a callback
        self._paused: dict[int, int] = {}  # channel -> credit that is held back
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._last_id = 0
        self._reason = "the guest's end was closed"  # given when the socket closes without an error

    # For the owner

    def send(self, channel: int, parts: Iterable[bytes | bytearray | memoryview]) -> None:
        """Queue a message for the guest.

        Raises:
            ConnectionClosed: the connection has ended.
            ValueError: no such channel, no or too many parts, or too big.
        """
        mux = self._session()
        mux.send(channel, parts)
        self._flush()

    def queued_bytes(self, channel: int) -> int:
        """Return how much waits for the guest to take it, in bytes."""
        return self._session().queued_bytes(channel)

    def pause(self, channel: int) -> None:
        """Stop giving credit for a channel. What is under way still comes: the window and one message at most."""
        self._paused.setdefault(channel, 0)

    def resume(self, channel: int) -> None:
        """Give credit again, also for what came during the pause."""
        held = self._paused.pop(channel, 0)
        if held and self._mux is not None and not self.closed.done():
            self._mux.consumed(channel, held)
            self._flush()

    def open_channel(self, channel: int) -> None:
        """Add a channel for a byte stream; the guest must have agreed (by a call), and do the same."""
        self._session().open_channel(channel)

    def close_channel(self, channel: int) -> None:
        """Forget a byte stream's channel, once both ends have agreed that nothing more is sent on it."""
        self._session().close_channel(channel)
        self._callbacks.pop(channel, None)
        self._waiting.pop(channel, None)
        self._paused.pop(channel, None)

    async def call(self, method: str, params: Any = None, *, timeout_s: float | None = 30) -> Any:
        """Call a method of the guest's runtime (JSON-RPC 2.0) and return its result.

        Args:
            method: its name.
            params: an object or a list; None for none.
            timeout_s: how long to wait for the answer in seconds; None for as long as the connection lives.

        Raises:
            GuestError: the runtime answered with an error.
            ConnectionClosed: the connection ended first, or had ended.
            MachineTimeout: no answer in time; the call may still have an effect.
        """
        self._last_id = number = self._last_id + 1
        request: dict[str, Any] = {"jsonrpc": "2.0", "id": number, "method": method}
        if params is not None:
            request["params"] = params
        self.send(Channel.RPC, [wire.dump_json(request)])
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._calls[number] = answer
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise MachineTimeout(f"The guest at {self.address} did not answer {method} in {timeout_s:g} s.") from None
        finally:
            self._calls.pop(number, None)

    async def close(self, reason: str = "no longer needed") -> None:
        """Tell the guest, and close. Waits until the socket is closed, a second at most; does nothing when it is.

        Args:
            reason: told to the guest, and the result of `closed`.
        """
        if not self.closed.done() and self._mux is not None and self._transport is not None:
            self._mux.close(reason)
            self._blocked = False
            self._transport.writelines(self._mux.data_to_send(0))
            self._mux = None
            self._reason = reason
            self._transport.close()
            await asyncio.wait({self.closed}, timeout=CLOSE_TIMEOUT_S)
        self._end(reason)

    # Connecting

    async def _connect(self) -> None:
        if isinstance(self.address, UnixAddress):
            await self._loop.create_unix_connection(lambda: self, str(self.address.path))
            return
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await self._loop.sock_connect(sock, (self.address.cid, self.address.port))
            await self._loop.create_connection(lambda: self, sock=sock)
        except BaseException:
            sock.close()
            raise

    async def _greet(self) -> None:
        """Repeat the HELLO until it is answered, and wait until the session stands."""
        silent_s = 0.0
        while not self._established.done():
            if silent_s >= READY_TIMEOUT_S:
                self._handshake.restart()
                silent_s = 0.0
            if self._handshake.unanswered and not self._blocked:
                self._write(self._handshake.hello())
            await asyncio.wait({self._established}, timeout=HELLO_INTERVAL_S)
            silent_s = 0.0 if self._handshake.unanswered else silent_s + HELLO_INTERVAL_S
        self._established.result()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 (for the type checker)
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_CHUNK)

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        mux = self._mux
        try:
            if mux is not None:
                messages = mux.receive(data)
            elif self._established.done():
                return  # closing
            else:
                messages = self._continue_handshake(data)
                mux = self._mux
            for message in messages:
                if not self.closed.done():
                    self._dispatch(message)
        except (wire.FrameError, FrameError) as error:
            self._end(str(error), FrameError(f"The guest at {self.address} broke the protocol: {error}"))
            return
        if mux is None:
            return
        if mux.closed is not None:
            self._end(f"closed by the guest: {mux.closed}")
        self._flush()

    def pause_writing(self) -> None:
        """Part of asyncio.Protocol."""
        self._blocked = True

    def resume_writing(self) -> None:
        """Part of asyncio.Protocol."""
        self._blocked = False
        self._flush()

    def eof_received(self) -> bool:
        """Part of asyncio.Protocol."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Part of asyncio.Protocol."""
        self._end(f"connection lost: {exc}" if exc else self._reason)

    # Inside

    def _session(self) -> Mux:
        if self._mux is None or self.closed.done():
            reason = self.closed.result() if self.closed.done() else "closing"
            raise ConnectionClosed(f"The connection to the guest at {self.address} has ended: {reason}.")
        return self._mux

    def _continue_handshake(self, data: bytes) -> list[Message]:
        try:
            answer, messages = self._handshake.feed(data)
        except wire.HandshakeError as error:
            self._end(
                str(error),
                AuthenticationError(
                    f"{error} ({self.address})",
                    hint="Another machine may have taken its place; discard the lease and acquire a new one.",
                ),
            )
            return []
        if answer:
            self._write(answer)
        if self._handshake.mux is not None:
            self._mux = self._handshake.mux
            self.ready = self._handshake.ready
            self._established.set_result(None)
        return messages

    def _dispatch(self, message: Message) -> None:
        channel = message.channel
        if channel == Channel.RPC:
            self._answer(message.parts)
            self._consumed(message)
            return
        callback = self._callbacks.get(channel)
        if callback is None:
            self._waiting.setdefault(channel, []).append(message)
            return
        try:
            callback(message.parts)
        except Exception as error:  # one bad message must not cost the connection; the owner's bug is shown
            self._loop.call_exception_handler(
                {"message": f"A callback of channel {channel} failed", "exception": error, "protocol": self}
            )
        self._consumed(message)

    def _deliver_waiting(self, channel: int) -> None:
        for message in self._waiting.pop(channel, ()):
            self._dispatch(message)
        self._flush()

    def _consumed(self, message: Message) -> None:
        channel = message.channel
        if channel in self._paused:
            self._paused[channel] += message.size
        elif self._mux is not None:
            self._mux.consumed(channel, message.size)

    def _answer(self, parts: list[bytes]) -> None:
        """Take one JSON-RPC response or notification."""
        value = wire.load_json(parts[0]) if len(parts) == 1 else None
        if not isinstance(value, dict):
            raise wire.FrameError("A message on the RPC channel is not one JSON object.")
        method, number, error = value.get("method"), value.get("id"), value.get("error")
        if isinstance(method, str) and "id" not in value:
            if self.on_notification is None:
                _log.debug("notification ignored", method=method[:100], address=str(self.address))
                return
            try:
                self.on_notification(method, value.get("params"))
            except Exception as failure:
                self._loop.call_exception_handler(
                    {"message": f"The callback for {method!r} failed", "exception": failure, "protocol": self}
                )
            return
        if type(number) is not int or number > self._last_id or ("result" in value) == (error is not None):
            raise wire.FrameError("A message on the RPC channel is neither a response nor a notification.")
        answer = self._calls.pop(number, None)
        if answer is None or answer.done():
            return  # given up meanwhile
        if error is None:
            answer.set_result(value["result"])
        elif isinstance(error, dict) and type(error.get("code")) is int and isinstance(error.get("message"), str):
            answer.set_exception(GuestError(error["code"], error["message"], error.get("data")))
        else:
            answer.set_exception(FrameError("The guest answered with an error that is not valid JSON-RPC 2.0."))

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _flush(self) -> None:
        """Hand frames to the socket as long as it takes them."""
        mux, transport = self._mux, self._transport
        if mux is None or transport is None or transport.is_closing():
            return
        while not self._blocked:
            frames = mux.data_to_send(WRITE_CHUNK)
            if not frames:
                return
            transport.writelines(frames)

    def _end(self, reason: str, error: TransportError | None = None) -> None:
        """End the connection at once and tell everybody who waits for it. Only the first reason counts."""
        if self._transport is not None:
            self._transport.abort()
        if self.closed.done():
            return
        self.closed.set_result(reason)
        if error is None:
            error = ConnectionClosed(f"The connection to the guest at {self.address} has ended: {reason}.")
        if not self._established.done():
            self._established.set_exception(error)
            self._established.exception()  # nobody may be waiting any more
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error)
        self._calls.clear()
        self._waiting.clear()
