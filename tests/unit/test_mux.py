"""The mux: round trips, limits that a hostile peer runs into, order of sending, credit."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_runtime import wire
from guest_runtime.mux import Message, Mux
from guest_runtime.wire import FRAME_COST, MAX_PAYLOAD, MIN_FRAGMENT, MORE, WINDOW, Channel, FrameError, FrameType

ALL = tuple(wire.CHANNELS)


def take(mux: Mux, max_bytes: int = 1 << 40) -> bytes:
    return b"".join(mux.data_to_send(max_bytes))


def pump(sender: Mux, receiver: Mux) -> list[Message]:
    """Move everything from one end to the other, consuming at once, until nothing moves any more."""
    messages = []
    while data := take(sender, MAX_PAYLOAD):
        for message in receiver.receive(data):
            messages.append(message)
            receiver.consumed(message.channel, message.size)
        sender.receive(take(receiver))
    return messages


_parts = st.lists(st.binary(max_size=300) | st.integers(0, 200_000).map(bytes), min_size=1, max_size=5)
_traffic = st.lists(st.tuples(st.sampled_from(ALL[1:]), _parts), max_size=12)


@given(_traffic, st.data())
@settings(deadline=None)
def test_round_trip_with_any_cutting(traffic, data):
    sender, receiver = Mux(), Mux()
    for channel, parts in traffic:
        sender.send(channel, parts)
    got = []
    while stream := take(sender, data.draw(st.integers(1, 300_000))):
        while stream:
            cut = data.draw(st.integers(1, len(stream)) | st.just(len(stream)))
            for message in receiver.receive(stream[:cut]):
                got.append(message)
                receiver.consumed(message.channel, message.size)
            stream = stream[cut:]
        sender.receive(take(receiver))
    assert not receiver.mid_frame
    for channel in ALL:
        assert [m.parts for m in got if m.channel == channel] == [p for c, p in traffic if c == channel]
        assert sender.queued_bytes(channel) == 0


def test_bytes_one_at_a_time():
    sender, receiver = Mux(), Mux()
    sender.send(Channel.SHELL, [b"a", b"", b"bc"])
    got = [message for byte in take(sender) for message in receiver.receive(bytes([byte]))]
    assert got == [Message(Channel.SHELL, [b"a", b"", b"bc"], 4 + 12 + 3 + FRAME_COST)]


def test_a_small_message_is_one_frame_in_one_buffer():
    mux = Mux()
    mux.send(Channel.SHELL, [b"{}"] * 4)
    assert len(mux.data_to_send()) == 1
    assert not mux.writable


# Hostile peers


@given(st.binary(max_size=2000))
def test_any_bytes_are_frames_or_refused(data):
    for mux in (Mux(), Mux(skip_challenges=True)):
        try:
            mux.receive(data)
        except FrameError:
            assert mux.unparsed
            assert data.endswith(mux.unparsed)


def _stream() -> bytes:
    mux = Mux()
    mux.send(Channel.SHELL, [b"first", b"message"])
    mux.send(Channel.IOPUB, [b"big", bytes(100_000)])
    mux.send(Channel.CONTROL, [b"urgent"])
    mux.send(Channel.SHELL, [b"last"])
    return take(mux)


STREAM = _stream()
SENT = {m.parts[0]: m for m in Mux().receive(STREAM)}


@given(st.integers(0, len(STREAM) - 1) | st.integers(0, 200), st.integers(1, 255))
def test_a_changed_byte_is_always_noticed(position, change):
    data = bytearray(STREAM)
    data[position] ^= change
    mux = Mux()
    try:
        got = mux.receive(bytes(data))
    except FrameError:
        return
    assert len(got) < len(SENT)  # a length grew: the rest is still awaited
    assert mux.mid_frame
    assert all(SENT[m.parts[0]] == m for m in got)


@given(
    st.lists(st.tuples(st.integers(0, len(STREAM)), st.integers(0, len(STREAM)), st.binary(max_size=40)), max_size=4)
)
@settings(deadline=None)
def test_spliced_streams_never_give_a_wrong_message(splices):
    data = STREAM
    for start, end, new in splices:
        data = data[:start] + new + data[end:]
    mux = Mux()
    got = []
    try:
        for at in range(0, len(data), 10_000):
            got += mux.receive(data[at : at + 10_000])
    except FrameError:
        pass
    assert all(SENT[m.parts[0]] == m for m in got)


def data_frame(payload: bytes, channel: int = Channel.IOPUB, flags: int = 0) -> bytes:
    return wire.frame(FrameType.DATA, channel, payload, flags)


def first_fragment(total: int, size: int = MAX_PAYLOAD) -> bytes:
    """The first fragment of a message of one part that has `total` bytes, table included."""
    return (struct.pack(">II", 1, total - 8) + bytes(size))[:size]


REFUSED = {
    "length": wire.HEADER.pack(FrameType.DATA, 0, 5, MAX_PAYLOAD + 1, 0),
    "huge length": wire.HEADER.pack(FrameType.DATA, 0, 5, 0xFFFFFFFF, 0),
    "type": wire.frame(9, 0, b""),
    "type 0": wire.frame(0, 0, b""),
    "handshake frame": wire.frame(FrameType.HELLO, 0, bytes(34)),
    "challenge": wire.frame(FrameType.CHALLENGE, 0, bytes(96)),
    "magic": wire.MAGIC,
    "checksum": data_frame(wire.encode_message([b"x"]))[:-1] + b"y",
    "channel": data_frame(wire.encode_message([b"x"]), channel=6),
    "stream nobody opened": data_frame(wire.encode_message([b"x"]), channel=16),
    "unknown flags": data_frame(wire.encode_message([b"x"]), flags=2),
    "empty payload": data_frame(b""),
    "no parts": data_frame(struct.pack(">II", 0, 0)),
    "too many parts": data_frame(struct.pack(">I", 1025) + bytes(4 * 1025)),
    "cut table": data_frame(struct.pack(">II", 3, 0)),
    "parts longer than message": data_frame(struct.pack(">II", 1, 5) + b"four"),
    "parts shorter than message": data_frame(struct.pack(">II", 1, 3) + b"four"),
    "tiny fragment": data_frame(first_fragment(1 << 20, MIN_FRAGMENT - 1), flags=MORE),
    "empty fragment": data_frame(b"", flags=MORE),
    "more after the end": data_frame(first_fragment(MIN_FRAGMENT, MIN_FRAGMENT), flags=MORE),
    "end before the end": data_frame(first_fragment(3 * MAX_PAYLOAD), flags=MORE) + data_frame(bytes(MAX_PAYLOAD)),
    "beyond the end": data_frame(first_fragment(MAX_PAYLOAD + 10), flags=MORE) + data_frame(bytes(11)),
    "too big a message": data_frame(first_fragment(wire.MAX_MESSAGE + 1), flags=MORE),
    "too big a call": data_frame(first_fragment(wire.MAX_RPC_MESSAGE + 1), channel=Channel.RPC, flags=MORE),
    "credit of the wrong size": wire.frame(FrameType.CREDIT, 5, bytes(5)),
    "credit for no channel": wire.frame(FrameType.CREDIT, 6, bytes(4)),
    "credit overflow": wire.frame(FrameType.CREDIT, 5, b"\x7f" + b"\xff" * 3),
    "long reason": wire.frame(FrameType.CLOSE, 0, bytes(wire.MAX_REASON + 1)),
    "more than the credit": data_frame(wire.encode_message([bytes(60_000)])) * (WINDOW // 60_000 + 1),
    "tiny messages beyond the credit": data_frame(wire.encode_message([b""])) * (WINDOW // (8 + FRAME_COST) + 1),
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_refused(data):
    with pytest.raises(FrameError):
        Mux().receive(data)


def test_a_bad_length_is_refused_before_the_payload_comes():
    with pytest.raises(FrameError, match="bytes"):
        Mux().receive(wire.HEADER.pack(FrameType.DATA, 0, 5, MAX_PAYLOAD + 1, 0))
    mux = Mux()
    mux.receive(b"\x06\x00\x00\x05\x00\x01")
    with pytest.raises(FrameError, match="bytes"):
        mux.receive(b"\x00\x01" + bytes(4))


def test_a_peer_that_ignores_credit_is_stopped_inside_a_big_message():
    mux = Mux()
    held = mux.receive(data_frame(wire.encode_message([b"x"])))  # never consumed: nothing is granted ahead
    fragment = data_frame(bytes(MAX_PAYLOAD), flags=MORE)
    mux.receive(data_frame(first_fragment(8 << 20), flags=MORE))
    mux.receive(fragment * (WINDOW // MAX_PAYLOAD - 2))
    assert not mux.writable
    with pytest.raises(FrameError, match="credit"):
        mux.receive(fragment)
    assert len(held) == 1


def test_challenges_are_skipped_by_the_host_only():
    stray = wire.MAGIC + wire.frame(FrameType.CHALLENGE, 0, bytes(96))
    mux = Mux(skip_challenges=True)
    data = stray + data_frame(wire.encode_message([b"x"])) + stray * 2
    got = [message for byte in data for message in mux.receive(bytes([byte]))]
    assert [m.parts for m in got] == [[b"x"]]
    with pytest.raises(FrameError):
        mux.receive(b"\xa6" + bytes(15))


# Order of sending


def test_an_interrupt_overtakes_a_flood():
    sender, receiver = Mux(), Mux()
    for _ in range(100):
        sender.send(Channel.IOPUB, [bytes(100_000)])
    receiver.receive(take(sender, 1))
    sender.send(Channel.SHELL, [b"a cell"])
    sender.send(Channel.CONTROL, [b"interrupt"])
    sender.send(Channel.RPC, [b"ping"])
    sender.send(Channel.LINK, [b"link"])
    assert [m.channel for m in receiver.receive(take(sender, 60))] == [Channel.LINK, Channel.RPC, Channel.CONTROL]
    assert [m.channel for m in receiver.receive(take(sender, 500_000))][:2] == [Channel.IOPUB, Channel.SHELL]


def test_channels_take_turns():
    sender, receiver = Mux(), Mux()
    for _ in range(3):
        for channel in (Channel.IOPUB, Channel.SHELL, Channel.STDIN):
            sender.send(channel, [bytes(50_000)])
    order = []
    while data := take(sender, 1):
        order += [message.channel for message in receiver.receive(data)]
    assert order == [Channel.IOPUB, Channel.SHELL, Channel.STDIN] * 3


def test_a_channel_without_credit_does_not_stop_the_others():
    sender, receiver = Mux(), Mux()
    for _ in range(40):
        sender.send(Channel.IOPUB, [bytes(50_000)])
    receiver.receive(take(sender))
    assert not sender.writable
    assert sender.queued_bytes(Channel.IOPUB) > 0
    sender.send(Channel.SHELL, [b"reply"])
    sender.send(Channel.CONTROL, [b"interrupt"])
    assert [m.channel for m in receiver.receive(take(sender))] == [Channel.CONTROL, Channel.SHELL]


def test_close_goes_first_and_ends_receiving():
    sender, receiver = Mux(), Mux()
    sender.send(Channel.IOPUB, [b"late"])
    sender.close("done")
    assert receiver.receive(take(sender)) == []
    assert receiver.closed == "done"


def test_a_reason_is_safe_to_print():
    mux = Mux()
    mux.receive(wire.frame(FrameType.CLOSE, 0, b"\x1b[2Jgone\n\xff"))
    assert mux.closed == "\ufffd[2Jgone\ufffd\ufffd"


# Credit


def test_nothing_is_sent_beyond_the_window_until_it_is_consumed():
    sender, receiver = Mux(), Mux()
    for _ in range(1000):
        sender.send(Channel.IOPUB, [bytes(10_000)])
    got = receiver.receive(take(sender))
    assert WINDOW - 20_000 < sum(m.size for m in got) <= WINDOW
    assert not sender.writable
    assert not receiver.writable
    receiver.consumed(Channel.IOPUB, got[0].size)
    assert not receiver.writable  # credit is not worth a frame yet
    for message in got[1:60]:
        receiver.consumed(Channel.IOPUB, message.size)
    sender.receive(take(receiver))
    assert sender.writable


def test_a_message_much_bigger_than_the_window_passes():
    sender, receiver = Mux(), Mux()
    parts = [b"header", bytes(20 << 20), b"", b"end"]
    sender.send(Channel.IOPUB, parts)
    sender.send(Channel.IOPUB, [b"next"])
    assert [m.parts for m in pump(sender, receiver)] == [parts, [b"next"]]


def test_big_messages_on_many_channels_are_put_together_one_after_another():
    sender, receiver = Mux(), Mux()
    for channel in (Channel.SHELL, Channel.STDIN, Channel.IOPUB, Channel.RPC):
        sender.send(channel, [bytes(5 << 20)])
    held, most = 0, 0
    got = []
    while data := take(sender, MAX_PAYLOAD):
        held += len(data)
        for message in receiver.receive(data):
            got.append(message.channel)
            held -= message.size
            receiver.consumed(message.channel, message.size)
        most = max(most, held)
        sender.receive(take(receiver))
    assert sorted(got) == [Channel.RPC, Channel.SHELL, Channel.STDIN, Channel.IOPUB]
    assert most <= (5 << 20) + 4 * WINDOW


def test_an_unconsumed_big_message_stops_the_next_one():
    sender, receiver = Mux(), Mux()
    for _ in range(3):
        sender.send(Channel.IOPUB, [bytes(5 << 20)])
    got = []
    while data := take(sender):
        got += receiver.receive(data)
        sender.receive(take(receiver))
    assert len(got) == 1
    assert sender.queued_bytes(Channel.IOPUB) >= 2 * (5 << 20) - WINDOW
    receiver.consumed(Channel.IOPUB, got[0].size)
    sender.receive(take(receiver))
    assert len(pump(sender, receiver)) == 2


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_whatever_the_order_of_consuming_everything_arrives_and_memory_is_bounded(data):
    window = 4 * (MAX_PAYLOAD + FRAME_COST)
    sender, receiver = Mux(window=window), Mux(window=window)
    sizes = st.integers(0, 500) | st.integers(0, 4 * window) | st.sampled_from([window // 2, window, MAX_PAYLOAD])
    to_send = data.draw(st.lists(st.tuples(st.sampled_from(ALL[1:]), sizes), min_size=1, max_size=25))
    biggest = max(size for _, size in to_send)
    for channel, size in to_send:
        sender.send(channel, [bytes(size)])
    unconsumed: list[Message] = []
    arrived = held = 0
    while sender.writable or unconsumed:
        stream = take(sender, data.draw(st.integers(1, window)))
        held += len(stream)
        assert held <= len(ALL) * (window + 2 * MAX_PAYLOAD) + biggest * (1 + len(unconsumed))
        unconsumed += receiver.receive(stream)
        # The owner consumes some of what it has; all of it when the sender can do nothing more.
        count = data.draw(st.integers(0, len(unconsumed))) if sender.writable else len(unconsumed)
        for message in unconsumed[:count]:
            held -= message.size - FRAME_COST
            arrived += 1
            receiver.consumed(message.channel, message.size)
        del unconsumed[:count]
        sender.receive(take(receiver))
    assert arrived == len(to_send)
    assert not any(sender.queued_bytes(channel) for channel in ALL)


# Byte streams


def test_streams_open_and_close():
    sender, receiver = Mux(), Mux()
    for end in (sender, receiver):
        end.open_channel(16)
    sender.send(16, [bytes(5 << 20)])
    sender.send(Channel.SHELL, [bytes(5 << 20)])
    for _ in range(20):  # the stream holds the right to be put together beyond its window
        receiver.receive(take(sender, MAX_PAYLOAD))
        sender.receive(take(receiver))
    receiver.close_channel(16)
    sender.close_channel(16)
    assert [m.channel for m in pump(sender, receiver)] == [Channel.SHELL]
    receiver.consumed(16, 100)  # late
    receiver.receive(wire.frame(FrameType.CREDIT, 16, bytes(4)))  # late


@pytest.mark.parametrize("channel", [-1, 0, 5, 1 << 16])
def test_numbers_that_are_no_stream(channel):
    with pytest.raises(ValueError, match="channel number"):
        Mux().open_channel(channel)


def test_misuse_by_the_owner():
    mux = Mux()
    with pytest.raises(ValueError, match="part of every connection"):
        mux.close_channel(Channel.IOPUB)
    with pytest.raises(ValueError, match="not received that much"):
        mux.consumed(Channel.IOPUB, 1)
    with pytest.raises(ValueError, match="window"):
        Mux(window=100_000)
