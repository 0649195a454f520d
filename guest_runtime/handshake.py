r"""How host and guest find each other on a byte pipe and prove that they know the machine's secret. Sans-io, both ends.

Imports wire.py, mux.py and the standard library's hmac and os; never reads, writes, waits or looks at a clock.

The pipe may be a vsock connection, or a virtio-serial port: one endless stream on which hosts come and go without any
sign, with bytes of a dead host or a half-written frame still in it. So every frame of the handshake is preceded by
MAGIC, each end drops what comes before, and the host repeats its HELLO until it is answered::

    host   MAGIC HELLO      version u16, host_nonce[32]
    guest  MAGIC CHALLENGE  host_nonce, guest_nonce[32], HMAC-SHA256(secret, b"guest" + host_nonce + guest_nonce)
    host   MAGIC PROOF      HMAC-SHA256(secret, b"host" + host_nonce + guest_nonce)
    guest  MAGIC READY      JSON object: version of the runtime and so on; frames of the mux follow at once
           MAGIC REFUSED    host_nonce, reason in UTF-8; the guest goes on listening

The host checks the guest's HMAC before it shows its own. A HELLO may come at any time, also in the middle of a session
or of a half-received frame: it is answered, and its sender becomes the session's host once its PROOF is right. Inside a
half-received frame the old session goes on until then (the HELLO may be part of a message); where a frame should begin,
the HELLO shows that the old host is gone, and its session ends there.

The guest's agent has one GuestHandshake for each pipe (a virtio-serial port for its whole life, each accepted vsock
connection until it ends)::

    link = GuestHandshake(secret, lambda: {"runtime": "1.0", "pid": os.getpid()})
    unsent: list[bytes | memoryview] = []
    while True:
        readable, writable = wait_for(fd, read=True, write=bool(unsent) or link.writable)
        if readable:
            data = os.read(fd, 262144)          # b"" or an error on a vsock connection: drop the link.
            for event in link.feed(data):       # virtio-serial, host gone: link.end_session("host disconnected")
                match event:
                    case SessionStarted():
                        mux = event.mux         # keep it: while old events are handled, link.mux may be a newer one
                    case SessionLost():         # event.reason
                        mux = None              # until the next SessionStarted
                    case Message():             # from mux.py: event.channel, event.parts, event.size
                        ...                     # mux.send(Channel.IOPUB, parts), here or anywhere else
                        mux.consumed(event.channel, event.size)
        if writable:
            unsent = unsent or link.data_to_send(65536)
            unsent = drop_written(unsent, os.writev(fd, unsent[:IOV_MAX]))

`feed` never raises for anything that the peer sent. After SessionLost and SessionStarted in one `feed`, events that
follow belong to the new session. `link.secret = new` holds from the next handshake on and does not touch the session.
"""

import hmac
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from guest_runtime import wire
from guest_runtime.mux import Message, Mux
from guest_runtime.wire import HEADER, HEADER_SIZE, MAGIC, FrameError, FrameType, HandshakeError

NONCE_SIZE: Final = 32
_MAC_SIZE: Final = 32
_HELLO_SIZE: Final = 2 + NONCE_SIZE
_MAX_READY: Final = 16 * 1024

_SIZES: Final[Mapping[int, tuple[int, int]]] = {
    FrameType.HELLO: (_HELLO_SIZE, _HELLO_SIZE),
    FrameType.CHALLENGE: (2 * NONCE_SIZE + _MAC_SIZE, 2 * NONCE_SIZE + _MAC_SIZE),
    FrameType.PROOF: (_MAC_SIZE, _MAC_SIZE),
    FrameType.READY: (2, _MAX_READY),
    FrameType.REFUSED: (NONCE_SIZE, NONCE_SIZE + wire.MAX_REASON),
}
"""Least and most bytes of each handshake frame."""
_FROM_HOST: Final = frozenset({FrameType.HELLO, FrameType.PROOF})
_FROM_GUEST: Final = frozenset({FrameType.CHALLENGE, FrameType.READY, FrameType.REFUSED})


@dataclass(frozen=True, slots=True)
class SessionStarted:
    """A host has proved that it knows the secret. The peer's credit and all queues start anew in `mux`."""

    mux: Mux


@dataclass(frozen=True, slots=True)
class SessionLost:
    """The session is over and what was queued in its mux is gone; `reason` says why."""

    reason: str


Event = SessionStarted | SessionLost | Message


def _mac(secret: bytes, role: bytes, host_nonce: bytes, guest_nonce: bytes) -> bytes:
    return hmac.digest(secret, role + host_nonce + guest_nonce, "sha256")


def _pack(kind: FrameType, payload: bytes) -> bytes:
    return MAGIC + wire.frame(kind, 0, payload)


class _Scanner:
    """Finds handshake frames in a stream that may hold anything else; keeps no more than one of them."""

    def __init__(self, kinds: frozenset[FrameType]) -> None:
        self._kinds = kinds
        self._buffer = b""

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def take(self) -> tuple[FrameType, bytes] | None:
        """Return the next handshake frame, or None when more bytes are needed."""
        data = self._buffer
        at = data.find(MAGIC)
        while at >= 0:
            body = at + len(MAGIC) + HEADER_SIZE
            after = data.find(MAGIC, at + 1)  # a later greeting shows that this one was cut off
            if body > len(data):
                break
            kind, flags, channel, length, _ = HEADER.unpack_from(data, at + len(MAGIC))
            if kind in self._kinds and not flags and not channel and _SIZES[kind][0] <= length <= _SIZES[kind][1]:
                if body + length > len(data):
                    if after < 0:
                        break
                else:
                    payload = data[body : body + length]
                    if wire.frame(kind, 0, payload) == data[at + len(MAGIC) : body + length]:
                        self._buffer = data[body + length :]
                        return FrameType(kind), payload
            at = after
        self._buffer = data[at:] if at >= 0 else data[1 - len(MAGIC) :]
        return None

    def rest(self) -> bytes:
        """Return and forget what has not been looked at."""
        rest, self._buffer = self._buffer, b""
        return rest

    @property
    def started(self) -> bool:
        return len(self._buffer) >= len(MAGIC)


class GuestHandshake:
    """The guest's end of a pipe, for as long as the pipe lives.

    Args:
        secret: the lease's secret, at least 16 bytes.
        ready: called for each new session; returns what READY tells the host (JSON, under 16 KiB).
        make_mux: makes the mux of a new session.

    Attributes:
        secret: may be replaced at any time; counts from the next handshake on.
        mux: of the session that stands after the last `feed`, or None.
    """

    def __init__(
        self, secret: bytes, ready: Callable[[], Mapping[str, Any]], *, make_mux: Callable[[], Mux] = Mux
    ) -> None:
        self.secret = secret
        self.mux: Mux | None = None
        self._ready = ready
        self._make_mux = make_mux
        self._scanner = _Scanner(_FROM_HOST)
        self._nonces: tuple[bytes, bytes] | None = None  # of the host that was challenged last
        self._greeted = False  # a greeting was seen inside a half-received frame of the session
        self._tail = b""  # the last bytes that came while inside a frame: MAGIC may come in two reads
        self._out: list[bytes | memoryview] = []

    def feed(self, data: bytes) -> list[Event]:
        """Take bytes that were read from the pipe and return what happened, in order. Never raises."""
        mux = self.mux
        if mux is None:
            self._scanner.feed(data)
            return self._greet()
        events: list[Event] = []
        try:
            events += mux.receive(data)
        except FrameError as error:
            return self._lose(str(error), b"" if self._greeted else mux.unparsed, data)
        if mux.closed is not None:
            return events + self._lose(f"closed by the host: {mux.closed}", mux.unparsed, b"")
        if not mux.mid_frame:
            if self._greeted:  # it was part of a message after all
                self._forget_greeting()
        elif self._greeted or MAGIC in data or MAGIC in self._tail + data[: len(MAGIC)]:
            self._scanner.feed(data if self._greeted else self._tail + data)
            self._greeted = True
            events += self._greet()
        else:
            self._tail = (self._tail + data[-len(MAGIC) :])[-len(MAGIC) :]
        return events

    def data_to_send(self, max_bytes: int = wire.MAX_PAYLOAD) -> list[bytes | memoryview]:
        """Return bytes to write to the pipe, in this order, about `max_bytes` of them."""
        out, self._out = self._out, []
        if self.mux is not None:
            out += self.mux.data_to_send(max_bytes)
        return out

    @property
    def writable(self) -> bool:
        """Whether `data_to_send` has something."""
        return bool(self._out) or (self.mux is not None and self.mux.writable)

    def end_session(self, reason: str) -> list[Event]:
        """Forget the session and any half-done handshake: the pipe's other end is known to be gone."""
        self._forget_greeting()
        self._out.clear()
        if self.mux is None:
            return []
        self.mux = None
        return [SessionLost(reason)]

    def _lose(self, reason: str, unparsed: bytes, data: bytes) -> list[Event]:
        """End the session and look for a greeting in the bytes that it could not make sense of."""
        self.mux = None
        self._greeted = False
        self._scanner.feed(unparsed or data)
        return [SessionLost(reason), *self._greet()]

    def _forget_greeting(self) -> None:
        self._scanner.rest()
        self._nonces = None
        self._greeted = False

    def _greet(self) -> list[Event]:
        """Go through the handshake frames that have come."""
        answer = b""
        events: list[Event] = []
        while found := self._scanner.take():
            kind, payload = found
            if kind is FrameType.HELLO:
                answer = self._challenge(payload)
            elif self._nonces is not None:
                host_nonce, guest_nonce = self._nonces
                self._nonces = None
                if hmac.compare_digest(payload, _mac(self.secret, b"host", host_nonce, guest_nonce)):
                    return events + self._start()
                answer = _pack(FrameType.REFUSED, host_nonce + b"the host does not know this machine's secret")
        if answer:
            self._out.append(answer)
        return events

    def _challenge(self, hello: bytes) -> bytes:
        version, host_nonce = int.from_bytes(hello[:2], "big"), hello[2:]
        if version != wire.VERSION:
            reason = f"the guest speaks version {wire.VERSION} of the protocol, the host {version}"
            return _pack(FrameType.REFUSED, host_nonce + reason.encode())
        if self._nonces is None or self._nonces[0] != host_nonce:
            self._nonces = host_nonce, os.urandom(NONCE_SIZE)
        guest_nonce = self._nonces[1]
        mac = _mac(self.secret, b"guest", host_nonce, guest_nonce)
        return _pack(FrameType.CHALLENGE, host_nonce + guest_nonce + mac)

    def _start(self) -> list[Event]:
        """Begin the session of the host that has just proved itself, in place of an older one."""
        events: list[Event] = [] if self.mux is None else [SessionLost("another host took over")]
        info = wire.dump_json(dict(self._ready()))
        if len(info) > _MAX_READY:
            raise ValueError(f"What READY tells has {len(info)} bytes, more than {_MAX_READY}.")
        self.mux = self._make_mux()
        self._out.append(_pack(FrameType.READY, info))
        rest = self._scanner.rest()
        self._forget_greeting()
        return [*events, SessionStarted(self.mux), *(self.feed(rest) if rest else [])]


class HostHandshake:
    """The host's end of one connection, until the session stands.

    Args:
        secret: the lease's secret.
        make_mux: makes the mux; it must skip challenges.

    Attributes:
        mux: of the session; None until the guest is READY. From then on the mux is all that counts.
        ready: what the guest told about itself, once READY.

    Send `hello()` at once and again every 0.2 s while `unanswered`. Give what comes to `feed`, send what it returns.
    If READY does not follow for some seconds (the guest's agent was restarted in between), call `restart()`.
    """

    def __init__(self, secret: bytes, *, make_mux: Callable[[], Mux] = lambda: Mux(skip_challenges=True)) -> None:
        self.mux: Mux | None = None
        self.ready: dict[str, Any] = {}
        self.unanswered = True
        self._secret = secret
        self._make_mux = make_mux
        self._scanner = _Scanner(_FROM_GUEST)
        self._nonce = os.urandom(NONCE_SIZE)
        self._guest_nonce = b""

    def hello(self) -> bytes:
        """Return the greeting to send."""
        return _pack(FrameType.HELLO, wire.VERSION.to_bytes(2, "big") + self._nonce)

    def restart(self) -> None:
        """Begin again with a fresh nonce; `unanswered` is True again."""
        self._nonce = os.urandom(NONCE_SIZE)
        self._guest_nonce = b""
        self.unanswered = True

    def feed(self, data: bytes) -> tuple[bytes, list[Message]]:
        """Take bytes from the guest, until `mux` is set.

        Returns:
            What to send, and the messages that came right behind READY.

        Raises:
            HandshakeError: the guest does not know the secret, or refused.
            FrameError: READY, or what came behind it, is not valid.
        """
        self._scanner.feed(data)
        answer = b""
        while found := self._scanner.take():
            kind, payload = found
            if kind is FrameType.READY:
                if self._guest_nonce:  # otherwise a stale one
                    self._read_ready(payload)
                    assert self.mux is not None  # noqa: S101 (set by _read_ready)
                    rest = self._scanner.rest()
                    return b"", self.mux.receive(rest) if rest else []
            elif payload[:NONCE_SIZE] == self._nonce:  # otherwise meant for an earlier host
                if kind is FrameType.REFUSED:
                    raise HandshakeError(f"The guest refused: {wire.decode_reason(payload[NONCE_SIZE:])}.")
                answer = self._prove(payload[NONCE_SIZE : 2 * NONCE_SIZE], payload[2 * NONCE_SIZE :]) or answer
        return answer, []

    def _prove(self, guest_nonce: bytes, mac: bytes) -> bytes:
        if not hmac.compare_digest(mac, _mac(self._secret, b"guest", self._nonce, guest_nonce)):
            raise HandshakeError("The guest does not know this machine's secret.")
        if guest_nonce == self._guest_nonce:
            return b""  # the answer to a repeated HELLO
        self._guest_nonce = guest_nonce
        self.unanswered = False
        return _pack(FrameType.PROOF, _mac(self._secret, b"host", self._nonce, guest_nonce))

    def _read_ready(self, payload: bytes) -> None:
        info = wire.load_json(payload)
        if not isinstance(info, dict):
            raise FrameError("READY is not a JSON object.")
        self.ready = info
        self.mux = self._make_mux()
