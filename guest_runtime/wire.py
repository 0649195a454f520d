"""The wire format that host and guest speak: frames, messages, and the limits that both ends enforce.

Standard library only; never imports anything of agentvm_kernel, does no input or output and keeps no state, so that
the same code runs on the host and, under emulation, in the guest. `mux.py` turns frames into messages and back,
`handshake.py` authenticates the two ends before the first message.

A frame is a header of 12 bytes, big endian, and a payload::

    type u8 | flags u8 | channel u16 | length u32 | crc u32 | payload (length bytes)

The CRC-32 (zlib's) covers the first 8 bytes of the header and the payload. A message is a list of byte parts, encoded
as ``count u32 | length u32 x count | bodies`` and cut into DATA frames of one channel; all but the last carry `MORE`.

Limits, each refused at the first byte that shows it: MAX_PAYLOAD per frame, MIN_FRAGMENT (a frame with MORE is never
tiny, so that a hostile peer cannot make millions of objects out of one message; the table of lengths always fits the
first fragment), MAX_PARTS, the largest message of a channel, and the credit of a channel: a frame costs its payload
plus FRAME_COST, and nobody may send beyond what the receiver granted (WINDOW at the start, CREDIT frames after that).
"""

import json
import struct
import zlib
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, Final

VERSION: Final = 1
"""Version of this format; host and guest must have the same."""

MAGIC: Final = b"\xa6agentvm/1\r\n\x1a\n\x00\xff"
"""Precedes every frame of the handshake. Its first byte is no frame type, so it cannot be taken for a frame."""

HEADER: Final = struct.Struct(">BBHII")
HEAD: Final = struct.Struct(">BBHI")
"""The part of the header that the CRC covers."""
U32: Final = struct.Struct(">I")
HEADER_SIZE: Final = HEADER.size

MAX_PAYLOAD: Final = 64 * 1024
MIN_FRAGMENT: Final = 8 * 1024
MAX_PARTS: Final = 1024
MAX_MESSAGE: Final = 256 * 1024 * 1024
WINDOW: Final = 1024 * 1024
FRAME_COST: Final = 64
"""Credit that a frame costs beside its payload: what a tiny message costs the receiver in memory."""
MAX_CREDIT: Final = 1 << 31
MAX_REASON: Final = 1024
MAX_RPC_MESSAGE: Final = 16 * 1024 * 1024
MAX_JSON_DEPTH: Final = 64

_TABLES: Final = [struct.Struct(f">{count}I") for count in range(16)]
"""Ready-made for the common numbers of parts; looking a format up costs as much as the rest of the work."""

MORE: Final = 1
"""Flag: the message goes on in the next frame of this channel."""


class FrameType(IntEnum):
    """First byte of a frame."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    READY = 4
    REFUSED = 5
    DATA = 6
    CREDIT = 7
    CLOSE = 8


class Channel(IntEnum):
    """What a channel carries. LINK, RPC and CONTROL always go before the others."""

    LINK = 0
    RPC = 1
    CONTROL = 2
    SHELL = 3
    STDIN = 4
    IOPUB = 5
    STREAM_FIRST = 16


CHANNELS: Final = tuple(channel for channel in Channel if channel < Channel.STREAM_FIRST)
"""The channels that every connection has from the start."""

MESSAGE_LIMITS: Final = {int(Channel.LINK): MAX_PAYLOAD, int(Channel.RPC): MAX_RPC_MESSAGE}
"""Largest message of the channels that have a smaller limit than the connection's."""


class WireError(Exception):
    """Base of what the peer can do wrong on the wire."""


class FrameError(WireError):
    """The peer sent bytes that are not a valid frame or message, or more than it was allowed."""


class HandshakeError(WireError):
    """The peer does not know the secret, refused ours, or speaks another version."""


def frame(kind: int, channel: int, payload: bytes, flags: int = 0) -> bytes:
    """Return one whole frame.

    Args:
        kind: a FrameType.
        channel: 0 to 65535.
        payload: at most MAX_PAYLOAD bytes.
        flags: 0 or MORE.
    """
    head = HEAD.pack(kind, flags, channel, len(payload))
    return b"".join((head, U32.pack(zlib.crc32(payload, zlib.crc32(head))), payload))


def fragment_header(channel: int, payload: memoryview, flags: int) -> bytes:
    """Return the header of a DATA frame whose payload is sent separately, without being copied."""
    head = HEAD.pack(FrameType.DATA, flags, channel, len(payload))
    return head + U32.pack(zlib.crc32(payload, zlib.crc32(head)))


def encode_message(parts: Iterable[bytes | bytearray | memoryview]) -> bytes:
    """Return a message's bytes, before they are cut into frames.

    Args:
        parts: one to MAX_PARTS byte strings.

    Raises:
        ValueError: no parts, or too many.
    """
    parts = list(parts)
    count = len(parts)
    if not 0 < count <= MAX_PARTS:
        raise ValueError(f"A message has 1 to {MAX_PARTS} parts, not {count}.")
    lengths = [len(part) if type(part) is bytes else memoryview(part).nbytes for part in parts]
    table = _TABLES[count + 1] if count < 15 else struct.Struct(f">{count + 1}I")
    return b"".join((table.pack(count, *lengths), *parts))


def decode_table(payload: bytes | memoryview) -> tuple[int, ...]:
    """Return the lengths of a message's parts, given its first fragment.

    Raises:
        FrameError: the table is cut off, empty or too long.
    """
    size = len(payload)
    if size < 8:
        raise FrameError(f"A message of {size} bytes has no table of parts.")
    (count,) = U32.unpack_from(payload)
    if not 0 < count <= MAX_PARTS or 4 + 4 * count > size:
        raise FrameError(f"A message claims {count} parts.")
    table = _TABLES[count] if count < 16 else struct.Struct(f">{count}I")
    return table.unpack_from(payload, 4)


def decode_reason(payload: bytes | memoryview) -> str:
    """Return a reason that the peer gives, safe to print: no control characters, so no escape sequences."""
    text = str(payload, "utf-8", "replace")
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)


def load_json(data: bytes | memoryview, *, max_depth: int = MAX_JSON_DEPTH) -> Any:
    """Parse JSON that the peer sent.

    Args:
        data: UTF-8 text; its size was bounded by the message's limit.
        max_depth: how deep lists and objects may be nested.

    Raises:
        FrameError: not UTF-8, not JSON (NaN and infinities included), or nested too deeply.
    """
    try:
        value = _decoder.decode(str(data, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"Invalid JSON from the peer: {error}") from error
    level = [value] if type(value) in (dict, list) else []
    depth = 0
    while level:
        depth += 1
        if depth > max_depth:
            raise FrameError(f"JSON from the peer is nested more than {max_depth} deep.")
        level = [
            child
            for node in level
            for child in (node.values() if type(node) is dict else node)
            if type(child) in (dict, list)
        ]
    return value


def dump_json(value: object) -> bytes:
    """Return `value` as compact JSON in ASCII.

    Raises:
        TypeError: it has something that JSON cannot hold.
        ValueError: it has NaN, an infinity or a cycle.
    """
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
