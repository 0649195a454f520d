"""Many channels over one authenticated byte pipe: fragmentation, priorities and credit. Both ends use it.

Sans-io: it never reads, writes, waits or looks at a clock, and imports nothing but wire.py. The owner passes in what it
read and writes what it gets::

    for message in mux.receive(os.read(fd, 262144)):      # FrameError: drop the session
        handle(message.channel, message.parts)
        mux.consumed(message.channel, message.size)       # when it is really dealt with, not before
    mux.send(Channel.IOPUB, [b"...", b"..."])             # queues; never blocks
    buffers = mux.data_to_send(65536)                     # whole frames; write them in this order, all of them

Order: CREDIT and CLOSE frames, then everything queued on LINK, RPC and CONTROL in that order, then one frame of each
other channel in turn. So call `data_to_send` with a small size, and only when the pipe takes more: what it returned
cannot be overtaken any more. `writable` tells whether it would return something.

Credit: each direction of each channel starts with `window` bytes. The receiver grants more as its owner calls
`consumed`; an owner that cannot keep up simply does not, and the peer's queue grows instead (see `queued_bytes`).
A message bigger than the window is granted as it is put together, one such message at a time for the whole connection,
so a peer can never make us hold more than one message and its window per channel, and one big half message in all.
"""

import zlib
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from guest_runtime import wire
from guest_runtime.wire import (
    FRAME_COST,
    HEADER,
    HEADER_SIZE,
    MAGIC,
    MAX_PAYLOAD,
    MIN_FRAGMENT,
    MORE,
    U32,
    FrameError,
    FrameType,
)

_DATA = int(FrameType.DATA)
_CREDIT = int(FrameType.CREDIT)
_CLOSE = int(FrameType.CLOSE)
_CHALLENGE = int(FrameType.CHALLENGE)
_CONTROL = int(wire.Channel.CONTROL)
_PRIORITY = (wire.Channel.LINK, wire.Channel.RPC, wire.Channel.CONTROL)
_FULL_FRAME = MAX_PAYLOAD + FRAME_COST


class Message(NamedTuple):
    """A whole message of the peer.

    Attributes:
        channel: the channel's number.
        parts: its byte strings, copies that the owner may keep.
        size: the credit it took; give it back with `Mux.consumed(channel, size)`.
    """

    channel: int
    parts: list[bytes]
    size: int


class _Channel:
    """Both directions of one channel."""

    __slots__ = (
        "consumed", "credit", "fragments", "lengths", "limit", "max_message", "missing", "number", "partial", "queue",
        "queued", "received", "waiting",
    )  # fmt: skip

    def __init__(self, number: int, window: int, max_message: int) -> None:
        self.number = number
        self.max_message = max_message
        # Sending: frames (bytes) and what is left of messages longer than a frame (memoryview).
        self.queue: deque[bytes | memoryview] = deque()
        self.queued = 0
        self.credit = window
        self.waiting = False  # for credit
        # Receiving, in credit since the session began: how much came, how much is allowed, how much was consumed.
        self.received = 0
        self.limit = window
        self.consumed = 0
        # The message that is being put together: its fragments, their credit, its table, the bytes still to come.
        self.fragments: list[bytes] = []
        self.partial = 0
        self.lengths: tuple[int, ...] = ()
        self.missing = 0


class Mux:
    """One end of a session.

    Args:
        window: credit of each channel at the start, in bytes; must be the same at both ends.
        max_message: largest message, in bytes, in both directions; some channels have less (wire.MESSAGE_LIMITS).
        skip_challenges: the host's end, where a guest may answer a greeting that it saw inside a message.

    Attributes:
        closed: the reason that the peer gave when it closed the session, else None. Nothing is received after that.
    """

    def __init__(
        self, *, window: int = wire.WINDOW, max_message: int = wire.MAX_MESSAGE, skip_challenges: bool = False
    ) -> None:
        if window < 4 * _FULL_FRAME:
            raise ValueError(f"A window has at least {4 * _FULL_FRAME} bytes, not {window}.")
        self.closed: str | None = None
        self._window = window
        self._max_message = max_message
        self._skip_challenges = skip_challenges
        self._channels: dict[int, _Channel] = {}
        for channel in wire.CHANNELS:
            self.open_channel(channel)
        self._priority = [self._channels[channel] for channel in _PRIORITY]
        self._turn: deque[_Channel] = deque()  # other channels that have a frame and credit
        self._urgent: list[bytes] = []  # CREDIT and CLOSE frames
        self._chunks: list[bytes] = []  # the beginning of a frame that is not complete
        self._have = 0
        self._need = 0
        self._unparsed = b""
        self._assembling: _Channel | None = None  # puts together a message bigger than its window

    def open_channel(self, channel: int) -> None:
        """Add a channel, for a byte stream say. Both ends must do it before either sends on it."""
        if channel in self._channels or not 0 <= channel <= 0xFFFF:
            raise ValueError(f"Channel {channel} is open already, or not a channel number.")
        limit = min(self._max_message, wire.MESSAGE_LIMITS.get(channel, self._max_message))
        self._channels[int(channel)] = _Channel(int(channel), self._window, limit)

    def close_channel(self, channel: int) -> None:
        """Forget a channel, once both ends have agreed that nothing more is sent on it."""
        if channel < wire.Channel.STREAM_FIRST:
            raise ValueError(f"Channel {channel} is part of every connection.")
        gone = self._channels.pop(channel)
        if gone in self._turn:
            self._turn.remove(gone)
        if self._assembling is gone:
            self._release_assembly()

    # Sending

    def send(self, channel: int, parts: Iterable[bytes | bytearray | memoryview]) -> None:
        """Queue a message.

        Raises:
            ValueError: no such channel, no or too many parts, or a message bigger than the channel allows.
        """
        out = self._channels.get(channel)
        if out is None:
            raise ValueError(f"Channel {channel} is not open.")
        body = wire.encode_message(parts)
        size = len(body)
        if size <= MAX_PAYLOAD:
            out.queue.append(wire.frame(_DATA, channel, body))
        elif size <= out.max_message:
            out.queue.append(memoryview(body))
        else:
            raise ValueError(f"A message of {size} bytes is too big for channel {channel} ({out.max_message} bytes).")
        if not out.queued and not out.waiting and channel > _CONTROL:
            self._turn.append(out)
        out.queued += size

    def close(self, reason: str) -> None:
        """Tell the peer that the session ends; it goes out before anything that is queued."""
        self._urgent.append(wire.frame(_CLOSE, 0, reason.encode()[: wire.MAX_REASON]))

    def queued_bytes(self, channel: int) -> int:
        """Return how much of what was sent on a channel has not been taken by `data_to_send`, in bytes."""
        return self._channels[channel].queued

    @property
    def writable(self) -> bool:
        """Whether `data_to_send` has something."""
        return bool(self._urgent or self._turn) or any(c.queued and not c.waiting for c in self._priority)

    def data_to_send(self, max_bytes: int = MAX_PAYLOAD) -> list[bytes | memoryview]:
        """Return whole frames to write to the pipe, in this order.

        Args:
            max_bytes: stop after the frame that reaches this. At least one frame comes if there is one to send.
        """
        out: list[bytes | memoryview] = []
        size = 0
        if self._urgent:
            out += self._urgent
            size = sum(map(len, out))
            self._urgent.clear()
        for channel in self._priority:
            while channel.queued and not channel.waiting and size < max_bytes:
                size += self._take_frame(channel, out)
        turn = self._turn
        while turn and size < max_bytes:
            channel = turn.popleft()
            size += self._take_frame(channel, out)
            if channel.queued and not channel.waiting:
                turn.append(channel)
        return out

    def _take_frame(self, channel: _Channel, out: list[bytes | memoryview]) -> int:
        """Append the next frame of a channel to `out` and return its size; 0 when the credit does not suffice."""
        item = channel.queue[0]
        if isinstance(item, bytes):
            payload = len(item) - HEADER_SIZE
            if payload + FRAME_COST > channel.credit:
                channel.waiting = True
                return 0
            channel.queue.popleft()
            out.append(item)
        else:
            payload = min(len(item), MAX_PAYLOAD)
            if payload + FRAME_COST > channel.credit:
                channel.waiting = True
                return 0
            fragment = item[:payload]
            if payload < len(item):
                channel.queue[0] = item[payload:]
                out.append(wire.fragment_header(channel.number, fragment, MORE))
            else:
                channel.queue.popleft()
                out.append(wire.fragment_header(channel.number, fragment, 0))
            out.append(fragment)
        channel.credit -= payload + FRAME_COST
        channel.queued -= payload
        return payload + HEADER_SIZE

    # Receiving

    def receive(self, data: bytes) -> list[Message]:
        """Take bytes from the peer and return the messages that they complete.

        Raises:
            FrameError: the peer broke the protocol and the session is over; `unparsed` begins at the bad frame.
        """
        if self._have:
            self._chunks.append(data)
            self._have += len(data)
            if self._have < self._need:
                return []
            data = b"".join(self._chunks)
            self._chunks.clear()
            self._have = 0
        messages: list[Message] = []
        view = memoryview(data)
        end = len(data)
        at = 0
        crc32 = zlib.crc32
        unpack = HEADER.unpack_from
        try:
            while True:
                if end - at < HEADER_SIZE:
                    self._need = HEADER_SIZE
                    break
                kind, flags, number, length, crc = unpack(data, at)
                if kind == MAGIC[0] and self._skip_challenges:
                    if end - at < len(MAGIC):
                        self._need = len(MAGIC)
                        break
                    if data[at : at + len(MAGIC)] == MAGIC:
                        at += len(MAGIC)
                        continue
                if length > MAX_PAYLOAD or kind > _CLOSE:
                    raise FrameError(f"A frame of type {kind} and {length} bytes is not one of ours.")
                body = at + HEADER_SIZE
                stop = body + length
                if stop > end:
                    self._need = HEADER_SIZE + length
                    break
                payload = view[body:stop]
                if crc32(payload, crc32(view[at : at + 8])) != crc:
                    raise FrameError(f"A frame of {length} bytes on channel {number} has a wrong checksum.")
                if kind == _DATA:
                    channel = self._channels.get(number)
                    if channel is None:
                        raise FrameError(f"Channel {number} is not open.")
                    channel.received += length + FRAME_COST
                    if channel.received > channel.limit:
                        raise FrameError(f"More than the granted credit on channel {number}.")
                    if flags or channel.fragments:
                        message = self._add_fragment(channel, flags, payload)
                        if message is not None:
                            messages.append(message)
                    else:
                        messages.append(_whole_message(number, payload, data, body, stop))
                elif kind == _CREDIT:
                    self._credit(number, flags, payload)
                elif kind == _CLOSE and length <= wire.MAX_REASON:
                    self.closed = wire.decode_reason(payload)
                    self._unparsed = data[stop:]
                    return messages
                elif kind != _CHALLENGE or not self._skip_challenges:
                    raise FrameError(f"A frame of type {kind} has no place in a session.")
                at = stop
        except FrameError:
            self._unparsed = data[at:]
            raise
        if at < end:
            self._chunks.append(data[at:])
            self._have = end - at
        return messages

    @property
    def mid_frame(self) -> bool:
        """Whether the bytes received so far end inside a frame."""
        return self._have > 0

    @property
    def unparsed(self) -> bytes:
        """After a FrameError the bytes from the bad frame on; after the peer closed, the bytes that follow."""
        return self._unparsed

    def consumed(self, channel: int, nbytes: int) -> None:
        """Give credit back to the peer.

        Args:
            channel: the channel's number.
            nbytes: the `size` of the messages that have been dealt with.
        """
        inlet = self._channels.get(channel)
        if inlet is None:
            return  # a stream that was closed meanwhile
        if inlet.consumed + nbytes > inlet.received - inlet.partial:
            raise ValueError(f"Channel {channel} has not received that much.")
        inlet.consumed += nbytes
        self._grant(inlet)

    def _credit(self, number: int, flags: int, payload: memoryview) -> None:
        channel = self._channels.get(number)
        if channel is None and number >= wire.Channel.STREAM_FIRST:
            return  # a stream that was closed meanwhile
        if channel is None or flags or len(payload) != 4:
            raise FrameError(f"A CREDIT frame for channel {number} is not valid.")
        channel.credit += U32.unpack(payload)[0]
        if channel.credit > wire.MAX_CREDIT:
            raise FrameError(f"The credit of channel {number} overflows.")
        if channel.waiting:
            channel.waiting = False
            if number > _CONTROL:
                self._turn.append(channel)

    def _add_fragment(self, channel: _Channel, flags: int, payload: memoryview) -> Message | None:
        size = len(payload)
        if flags > MORE or (flags and size < MIN_FRAGMENT):
            raise FrameError(f"A fragment of {size} bytes with flags {flags} is not valid.")
        if not channel.fragments:
            channel.lengths = wire.decode_table(payload)
            total = 4 + 4 * len(channel.lengths) + sum(channel.lengths)
            if total > channel.max_message:
                raise FrameError(f"A message of {total} bytes is too big for channel {channel.number}.")
            channel.missing = total
        channel.missing -= size
        channel.fragments.append(bytes(payload))
        channel.partial += size + FRAME_COST
        if (channel.missing <= 0) == bool(flags) or channel.missing < 0:
            raise FrameError(f"A message on channel {channel.number} does not have the length that it claims.")
        if flags:
            self._grant(channel)
            return None
        message = Message(channel.number, _join_parts(channel.lengths, channel.fragments), channel.partial)
        channel.fragments = []
        channel.partial = 0
        if self._assembling is channel:
            self._release_assembly()
        return message

    def _release_assembly(self) -> None:
        """Let another channel put together a big message."""
        self._assembling = None
        for channel in self._channels.values():
            if channel.partial:
                self._grant(channel)

    def _grant(self, channel: _Channel) -> None:
        """Send credit, if it is worth a frame or the peer may be waiting for it in the middle of a message."""
        target = channel.consumed + self._window
        if channel.partial:
            idle = channel.consumed + channel.partial == channel.received  # no message waits for our owner
            if idle and channel.partial + channel.missing > self._window // 2 and self._assembling is None:
                self._assembling = channel
            if self._assembling is channel:
                target = channel.received + self._window
        owed = target - channel.limit
        if owed >= self._window // 2 or (
            owed > 0 and channel.partial and channel.limit - channel.received < _FULL_FRAME
        ):
            channel.limit = target
            self._urgent.append(wire.frame(_CREDIT, channel.number, U32.pack(owed)))


def _whole_message(channel: int, payload: memoryview, data: bytes, body: int, stop: int) -> Message:
    """Return the message that one frame holds; `payload` is a view of `data[body:stop]`."""
    lengths = wire.decode_table(payload)
    start = body + 4 + 4 * len(lengths)
    if start + sum(lengths) != stop:
        raise FrameError(f"A message on channel {channel} does not have the length that it claims.")
    parts = []
    for length in lengths:
        parts.append(data[start : start + length])
        start += length
    return Message(channel, parts, stop - body + FRAME_COST)


def _join_parts(lengths: tuple[int, ...], fragments: list[bytes]) -> list[bytes]:
    """Cut a message into its parts, copying each byte once."""
    views = iter(fragments)
    view = memoryview(next(views))[4 + 4 * len(lengths) :]
    parts = []
    for length in lengths:
        pieces = []
        while length > len(view):
            pieces.append(view)
            length -= len(view)
            view = memoryview(next(views))
        pieces.append(view[:length])
        view = view[length:]
        parts.append(b"".join(pieces))
    return parts
