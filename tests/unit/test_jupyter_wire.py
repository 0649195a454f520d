"""Our wire codec against jupyter_client's Session, both ways."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_client.session import Session as ReferenceSession

from agentvm_kernel.jupyter.wire import (
    EMPTY,
    MAX_JSON_DEPTH,
    Session,
    WireError,
    pack_json,
    parse_json,
)

KEY = b"a key that both ends know"


@pytest.fixture
def ours():
    return Session(KEY)


@pytest.fixture
def reference():
    return ReferenceSession(key=KEY)


def serialized(reference, msg_type="execute_request", content=None, ident=None, buffers=()):
    message = reference.msg(msg_type, content=content or {"code": "print('ä€😀')"})
    return [*reference.serialize(message, ident=ident), *buffers], message


def test_reads_what_jupyter_client_writes(ours, reference):
    frames, message = serialized(reference, ident=[b"router", b"client"], buffers=[b"\x00\x01", b""])
    received = ours.deserialize(frames)
    assert received.identities == [b"router", b"client"]
    assert received.msg_id == message["header"]["msg_id"]
    assert received.msg_type == "execute_request"
    assert received.content() == message["content"]
    assert received.parts[4:] == [b"\x00\x01", b""]


@pytest.mark.parametrize("scheme", ["hmac-sha256", "hmac-sha512", "hmac-sha1"])
def test_jupyter_client_reads_what_we_write(scheme):
    ours, reference = Session(KEY, scheme), ReferenceSession(key=KEY, signature_scheme=scheme)
    request, message = serialized(reference)
    parent = ours.deserialize(request).parts[0]
    frames = ours.serialize(
        ours.header("stream"),
        parent,
        {"k": [1, 2.5, None]},
        {"name": "stdout", "text": "ä€😀\n"},
        identities=(b"topic",),
        buffers=(b"raw", memoryview(b"view")),
    )
    identities, rest = reference.feed_identities([bytes(frame) for frame in frames])
    received = reference.deserialize(rest)
    assert identities == [b"topic"]
    assert received["msg_type"] == "stream"
    assert received["parent_header"]["msg_id"] == message["header"]["msg_id"]
    assert received["parent_header"] == message["header"]
    assert received["metadata"] == {"k": [1, 2.5, None]}
    assert received["content"] == {"name": "stdout", "text": "ä€😀\n"}
    assert [bytes(buffer) for buffer in received["buffers"]] == [b"raw", b"view"]
    assert received["header"]["date"].tzinfo is not None


def test_without_a_key_nothing_is_signed():
    ours, reference = Session(b""), ReferenceSession(key=b"")
    frames, _ = serialized(reference)
    assert ours.deserialize(frames).msg_type == "execute_request"
    assert ours.serialize(ours.header("status"), EMPTY, {}, {})[1] == b""


def test_refuses_a_replayed_message(ours, reference):
    frames, _ = serialized(reference)
    ours.deserialize(frames)
    with pytest.raises(WireError, match="replayed"):
        ours.deserialize(frames)


@pytest.mark.parametrize("part", range(4))
def test_refuses_a_message_changed_after_signing(ours, reference, part):
    frames, _ = serialized(reference)
    frames[2 + part] = frames[2 + part].replace(b"}", b' ,"x":1}') if frames[2 + part] != EMPTY else b'{"x":1}'
    with pytest.raises(WireError, match="wrong signature"):
        ours.deserialize(frames)


def test_a_forged_message_does_not_block_the_true_one(ours, reference):
    frames, _ = serialized(reference)
    forged = [*frames[:5], pack_json({"code": "evil"})]
    with pytest.raises(WireError):
        ours.deserialize(forged)
    assert ours.deserialize(frames).msg_type == "execute_request"


def test_refuses_another_key(ours):
    frames, _ = serialized(ReferenceSession(key=b"other"))
    with pytest.raises(WireError, match="wrong signature"):
        ours.deserialize(frames)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"identity"],
        [b"<IDS|MSG>"],
        [b"<IDS|MSG>", b"signature"],
        [b"<IDS|MSG>", b"", b"{}", b"{}", b"{}"],
    ],
)
def test_refuses_messages_without_the_four_parts(ours, frames):
    with pytest.raises(WireError):
        ours.deserialize(frames)


@pytest.mark.parametrize("header", [b"{}", b"[]", b"null", b'{"msg_id": 1, "msg_type": "x"}', b"{", b"\xff"])
def test_refuses_headers_that_are_none(header):
    with pytest.raises(WireError):
        Session(b"").deserialize([b"<IDS|MSG>", b"", header, b"{}", b"{}", b"{}"])


@pytest.mark.parametrize("scheme", ["hmac-nothing", "md5", ""])
def test_refuses_unknown_signature_schemes(scheme):
    with pytest.raises(WireError, match="Unknown signature scheme"):
        Session(KEY, scheme)


def test_forgets_the_oldest_signatures_only(ours, reference, monkeypatch):
    monkeypatch.setattr("agentvm_kernel.jupyter.wire._REMEMBERED_SIGNATURES", 2)
    messages = [serialized(reference)[0] for _ in range(3)]
    for frames in messages:
        ours.deserialize(frames)
    with pytest.raises(WireError, match="replayed"):
        ours.deserialize(messages[2])
    ours.deserialize(messages[0])


def nested(depth):
    return b'{"a":' * depth + b"1" + b"}" * depth


def test_json_depth_is_bounded():
    assert parse_json(nested(MAX_JSON_DEPTH), max_bytes=10_000)
    with pytest.raises(WireError, match="nested deeper"):
        parse_json(nested(MAX_JSON_DEPTH + 1), max_bytes=10_000)
    with pytest.raises(WireError):
        parse_json(b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", max_bytes=3_000_000)


def test_wide_json_is_not_deep():
    wide = {str(n): [n, {"n": n}] for n in range(1000)}
    assert parse_json(pack_json(wide), max_bytes=1_000_000) == wide


@pytest.mark.parametrize(
    "text", [b'{"a": NaN}', b'{"a": -Infinity}', b"[1]", b'"x"', b"", b"{} {}", b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_refuses_what_is_not_a_json_object(text):
    with pytest.raises(WireError):
        parse_json(text, max_bytes=10_000)


def test_refuses_long_json():
    with pytest.raises(WireError, match="longer than"):
        parse_json(b'{"a": "' + b"x" * 100 + b'"}', max_bytes=50)


def test_reads_memoryviews_and_broken_utf8():
    assert parse_json(memoryview(b'{"a": "\xff"}'), max_bytes=50) == {"a": "\ufffd"}


def test_lone_surrogates_do_not_break_the_encoder():
    assert json.loads(pack_json({"a": "\ud800"})) == {"a": "?"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), json_values))
def test_json_survives_a_round_trip(value):
    text = json.dumps(value)
    if any(0xD800 <= ord(character) < 0xE000 for character in json.dumps(value, ensure_ascii=False)):
        return
    assert parse_json(pack_json(value), max_bytes=1_000_000) == json.loads(text)


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(data):
    try:
        value = parse_json(data, max_bytes=100)
    except WireError:
        return
    assert isinstance(value, dict)
    assert not any(isinstance(item, float) and math.isnan(item) for item in value.values())


@given(st.lists(st.binary(max_size=30), max_size=8))
def test_any_frames_are_read_or_refused(frames):
    with pytest.raises(WireError):
        Session(KEY).deserialize(frames)
