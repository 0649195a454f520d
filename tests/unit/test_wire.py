"""The wire format's own functions: frames, tables of parts, JSON from a peer that may be hostile."""

import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_runtime import wire
from guest_runtime.wire import FrameError, FrameType


def test_a_frame_has_header_checksum_and_payload():
    frame = wire.frame(FrameType.DATA, 5, b"payload", wire.MORE)
    assert frame[:8] == bytes([6, 1, 0, 5, 0, 0, 0, 7])
    assert frame[8:12] == zlib.crc32(frame[:8] + b"payload").to_bytes(4, "big")
    assert frame[12:] == b"payload"
    assert wire.fragment_header(5, memoryview(b"payload"), wire.MORE) == frame[:12]


def test_magic_cannot_be_taken_for_a_frame():
    assert len(wire.MAGIC) == 16
    assert wire.MAGIC[0] not in list(FrameType)


@given(st.lists(st.binary(max_size=100), min_size=1, max_size=50))
def test_message_round_trip(parts):
    body = wire.encode_message(parts)
    assert list(wire.decode_table(body)) == [len(part) for part in parts]
    assert body[4 + 4 * len(parts) :] == b"".join(parts)


def test_parts_may_be_any_buffer():
    words = memoryview(bytes(range(16))).cast("I")
    body = wire.encode_message([bytearray(b"ab"), words])
    assert wire.decode_table(body) == (2, 16)
    assert body.endswith(b"ab" + bytes(range(16)))


@pytest.mark.parametrize("parts", [[], [b""] * (wire.MAX_PARTS + 1)])
def test_number_of_parts_is_checked_before_sending(parts):
    with pytest.raises(ValueError, match="parts"):
        wire.encode_message(parts)


@given(st.binary(max_size=5000))
def test_any_table_of_parts_is_read_or_refused(data):
    try:
        lengths = wire.decode_table(data)
    except FrameError:
        return
    assert 0 < len(lengths) <= wire.MAX_PARTS


def test_the_longest_table_fits_the_smallest_first_fragment():
    assert 4 + 4 * wire.MAX_PARTS <= wire.MIN_FRAGMENT


@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_refused(data):
    try:
        wire.load_json(data)
    except FrameError:
        return


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
)


@given(_json)
def test_json_round_trip(value):
    assert wire.load_json(wire.dump_json(value)) == value


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_nesting_is_limited(opening):
    closing = "]" if opening == "[" else "}"
    depth = wire.MAX_JSON_DEPTH
    wire.load_json((opening * depth + "1" + closing * depth).encode())
    with pytest.raises(FrameError, match="nested"):
        wire.load_json((opening * (depth + 1) + "1" + closing * (depth + 1)).encode())
    with pytest.raises(FrameError):
        wire.load_json((opening * 1_000_000).encode())
    with pytest.raises(FrameError):
        wire.load_json((opening * 100_000 + "1" + closing * 100_000).encode())


@pytest.mark.parametrize("text", [b"NaN", b"[Infinity]", b"-Infinity", b"\xff", b"9" * 10_000, b"", b"1 2"])
def test_what_is_not_json_is_refused(text):
    with pytest.raises(FrameError):
        wire.load_json(text)


def test_nan_is_not_sent():
    with pytest.raises(ValueError, match="JSON"):
        wire.dump_json(float("nan"))
    assert json.loads(wire.dump_json({"name": "é\udc80"})) == {"name": "é\udc80"}
