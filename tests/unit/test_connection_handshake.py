"""Both ends of the handshake, joined in memory: hosts that come, go, die half-way, and hosts that lie."""

import hmac
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_runtime import wire
from guest_runtime.handshake import GuestHandshake, HostHandshake, SessionLost, SessionStarted
from guest_runtime.mux import Message, Mux
from guest_runtime.wire import MAGIC, Channel, FrameError, FrameType, HandshakeError

SECRET = b"0123456789abcdef" * 2


def new_guest(secret: bytes = SECRET) -> GuestHandshake:
    return GuestHandshake(secret, lambda: {"runtime": "1"})


def take(end: GuestHandshake | Mux) -> bytes:
    return b"".join(end.data_to_send(1 << 40))


def join(guest: GuestHandshake, host: HostHandshake) -> list[object]:
    """Run a handshake to its end and return the guest's events."""
    events = guest.feed(host.hello())
    answer, _ = host.feed(take(guest))
    events += guest.feed(answer)
    host.feed(take(guest))
    assert host.mux is not None
    return events


def works(guest: GuestHandshake, host: HostHandshake) -> bool:
    """Whether messages go both ways."""
    host.mux.send(Channel.SHELL, [b"request"])
    (request,) = guest.feed(take(host.mux))
    guest.mux.send(Channel.IOPUB, [b"output"])
    (output,) = host.mux.receive(take(guest))
    return (request.parts, output.parts) == ([b"request"], [b"output"])


def test_session_starts():
    guest, host = new_guest(), HostHandshake(SECRET)
    assert host.unanswered
    (started,) = join(guest, host)
    assert started == SessionStarted(guest.mux)
    assert host.ready == {"runtime": "1"}
    assert not host.unanswered
    assert works(guest, host)


def test_bytes_one_at_a_time_and_messages_right_behind_the_handshake():
    guest, host = new_guest(), HostHandshake(SECRET)
    events, messages = [], []
    towards_guest, towards_host = host.hello(), b""
    while towards_guest or towards_host:
        for byte in towards_guest:
            events += guest.feed(bytes([byte]))
        if guest.mux and not messages:
            guest.mux.send(Channel.IOPUB, [b"at once"])
        towards_guest, towards_host = b"", take(guest)
        for byte in towards_host:
            if host.mux is None:
                answer, got = host.feed(bytes([byte]))
                towards_guest += answer
            else:
                got = host.mux.receive(bytes([byte]))
            messages += got
    assert [m.parts for m in messages] == [[b"at once"]]


def test_proof_and_first_messages_in_one_piece():
    guest, host = new_guest(), HostHandshake(SECRET)
    guest.feed(host.hello())
    proof, _ = host.feed(take(guest))
    early = Mux()
    early.send(Channel.SHELL, [b"early"])
    started, message = guest.feed(proof + take(early))
    assert isinstance(started, SessionStarted)
    assert message.parts == [b"early"]
    guest.mux.send(Channel.IOPUB, [b"at once"])
    _, (message,) = host.feed(take(guest))
    assert message.parts == [b"at once"]


def test_repeated_hello_is_answered_once_per_read_with_the_same_challenge():
    guest, host = new_guest(), HostHandshake(SECRET)
    guest.feed(host.hello() * 20)
    first = take(guest)
    assert first.count(MAGIC) == 1
    guest.feed(host.hello() * 2)
    second = take(guest)
    assert first == second
    proof, _ = host.feed(first + second)
    assert proof.count(MAGIC) == 1
    assert host.feed(second) == (b"", [])
    assert isinstance(guest.feed(proof)[0], SessionStarted)
    host.feed(take(guest))
    assert works(guest, host)


@pytest.mark.parametrize(
    "stale",
    [
        b"x",
        os.urandom(100_000),
        MAGIC,
        MAGIC[:7],
        MAGIC * 3 + MAGIC[:15],
        MAGIC + wire.HEADER.pack(FrameType.REFUSED, 0, 0, 500, 0),
        MAGIC + wire.HEADER.pack(FrameType.HELLO, 0, 0, 34, 0),
        MAGIC + wire.HEADER.pack(FrameType.READY, 0, 0, 16000, 0) + bytes(50),
        MAGIC + wire.HEADER.pack(FrameType.DATA, 0, 0, 0xFFFFFFFF, 0),
        wire.frame(FrameType.DATA, 5, bytes(1000))[:500],
    ],
)
def test_stale_bytes_before_the_handshake_are_dropped(stale):
    guest, host = new_guest(), HostHandshake(SECRET)
    guest.feed(stale)
    guest.feed(host.hello())
    proof, _ = host.feed(stale + take(guest))
    assert isinstance(guest.feed(proof)[-1], SessionStarted)
    host.feed(take(guest))
    assert works(guest, host)


def test_answers_for_an_earlier_host_are_ignored():
    guest, dead, host = new_guest(), HostHandshake(SECRET), HostHandshake(SECRET)
    guest.feed(dead.hello())
    stale = take(guest)
    guest.feed(dead.feed(stale)[0])
    stale += take(guest)  # CHALLENGE and READY that the dead host did not read
    assert host.feed(stale) == (b"", [])
    (lost, *_) = guest.feed(host.hello())
    assert isinstance(lost, SessionLost)
    proof, _ = host.feed(take(guest))
    guest.feed(proof)
    host.feed(take(guest))
    assert works(guest, host)


def test_new_host_in_the_middle_of_a_session():
    guest, first, second = new_guest(), HostHandshake(SECRET), HostHandshake(SECRET)
    join(guest, first)
    old = guest.mux
    lost, started = join(guest, second)
    assert isinstance(lost, SessionLost)
    assert started == SessionStarted(guest.mux)
    assert guest.mux is not old
    assert works(guest, second)


@given(st.integers(1, 70_000), st.integers(1, 100))
@settings(deadline=None)
def test_new_host_after_one_that_died_inside_a_frame(cut, piece):
    guest, first, second = new_guest(), HostHandshake(SECRET), HostHandshake(SECRET)
    join(guest, first)
    first.mux.send(Channel.SHELL, [bytes(65_000)])
    stream = take(first.mux)
    cut = min(cut, len(stream) - 1)
    assert guest.feed(stream[:cut]) == []
    events: list[object] = []
    for _ in range(3):  # the host repeats its HELLO; three times is plenty
        hello = second.hello()
        for at in range(0, len(hello), piece):
            events += guest.feed(hello[at : at + piece])
        proof, _ = second.feed(take(guest))
        events += guest.feed(proof)
        if any(isinstance(event, SessionStarted) for event in events):
            break
        assert second.unanswered
    second.feed(take(guest))
    assert [type(event) for event in events] == [SessionLost, SessionStarted]
    assert works(guest, second)


def test_a_greeting_inside_a_message_does_not_disturb_the_session():
    guest, host = new_guest(), HostHandshake(SECRET)
    join(guest, host)
    content = bytes(1000) + HostHandshake(b"another secret!!").hello() + bytes(50_000) + MAGIC
    host.mux.send(Channel.SHELL, [content])
    stream = take(host.mux)
    events, back = [], b""
    for at in range(0, len(stream), 1100):
        events += guest.feed(stream[at : at + 1100])
        back += take(guest)
    assert [event.parts for event in events] == [[content]]
    assert MAGIC in back  # it was answered, which the host skips
    assert host.mux.receive(back) == []
    assert works(guest, host)


def test_close_ends_the_session_and_a_greeting_behind_it_is_seen():
    guest, first, second = new_guest(), HostHandshake(SECRET), HostHandshake(SECRET)
    join(guest, first)
    first.mux.close("done")
    (lost,) = guest.feed(take(first.mux) + second.hello())
    assert "done" in lost.reason
    guest.feed(second.feed(take(guest))[0])
    second.feed(take(guest))
    assert works(guest, second)


def test_garbage_in_a_session_ends_it_and_the_guest_serves_on():
    guest, first, second = new_guest(), HostHandshake(SECRET), HostHandshake(SECRET)
    join(guest, first)
    (lost,) = guest.feed(b"garbage, more than a header")
    assert isinstance(lost, SessionLost)
    assert guest.mux is None
    join(guest, second)
    assert works(guest, second)


def test_end_session():
    guest, host = new_guest(), HostHandshake(SECRET)
    assert guest.end_session("nobody there") == []
    join(guest, host)
    assert guest.end_session("host disconnected") == [SessionLost("host disconnected")]
    assert guest.mux is None
    assert not guest.writable


# Trust


def test_the_host_shows_nothing_to_a_guest_with_another_secret():
    guest, host = new_guest(b"another secret of another lease."), HostHandshake(SECRET)
    guest.feed(host.hello())
    with pytest.raises(HandshakeError, match="secret"):
        host.feed(take(guest))
    join(guest, HostHandshake(b"another secret of another lease."))


def test_a_host_with_a_wrong_proof_is_refused_and_the_guest_serves_on():
    guest, liar, host = new_guest(), HostHandshake(SECRET), HostHandshake(SECRET)
    guest.feed(liar.hello())
    take(guest)
    assert guest.feed(MAGIC + wire.frame(FrameType.PROOF, 0, bytes(32))) == []
    assert guest.mux is None
    with pytest.raises(HandshakeError, match="refused"):
        liar.feed(take(guest))
    assert join(guest, host) == [SessionStarted(guest.mux)]
    assert works(guest, host)


def test_a_stranger_cannot_take_over_half_a_frame():
    guest, host = new_guest(), HostHandshake(SECRET)
    join(guest, host)
    mux = guest.mux
    host.mux.send(Channel.SHELL, [bytes(60_000)])
    guest.feed(take(host.mux)[:1000])
    guest.feed(HostHandshake(b"x").hello())
    assert guest.feed(MAGIC + wire.frame(FrameType.PROOF, 0, os.urandom(32))) == []
    assert guest.mux is mux


def test_a_proof_counts_once():
    guest, host = new_guest(), HostHandshake(SECRET)
    guest.feed(host.hello())
    proof, _ = host.feed(take(guest))
    guest.feed(proof)
    guest.end_session("gone")
    assert guest.feed(proof) == []
    assert guest.feed(host.hello() + proof) == []  # the same greeting gets a new challenge
    assert guest.mux is None


def test_an_echo_of_the_hosts_own_proof_is_no_challenge():
    """The two ends' HMACs are told apart by the role, so neither can be used as the other."""
    host = HostHandshake(SECRET)
    nonces = host.hello()[-32:] + bytes(32)
    mac = hmac.digest(SECRET, b"host" + nonces, "sha256")
    with pytest.raises(HandshakeError):
        host.feed(MAGIC + wire.frame(FrameType.CHALLENGE, 0, nonces + mac))


def test_ready_without_a_challenge_is_ignored():
    host = HostHandshake(SECRET)
    assert host.feed(MAGIC + wire.frame(FrameType.READY, 0, b"{}")) == (b"", [])
    assert host.mux is None


def test_ready_must_be_a_json_object():
    guest, host = new_guest(), HostHandshake(SECRET)
    guest.feed(host.hello())
    host.feed(take(guest))
    with pytest.raises(FrameError, match="object"):
        host.feed(MAGIC + wire.frame(FrameType.READY, 0, b"[]"))


def test_another_version_is_refused_with_both_numbers():
    guest, host = new_guest(), HostHandshake(SECRET)
    guest.feed(MAGIC + wire.frame(FrameType.HELLO, 0, b"\x00\x63" + host.hello()[-32:]))
    with pytest.raises(HandshakeError, match=r"version 1 .* 99"):
        host.feed(take(guest))


def test_a_new_secret_counts_from_the_next_handshake_on():
    guest, host = new_guest(), HostHandshake(SECRET)
    join(guest, host)
    guest.secret = b"fresh secret of this lease"
    assert works(guest, host)
    join(guest, HostHandshake(guest.secret))
    late = HostHandshake(SECRET)
    guest.feed(late.hello())
    with pytest.raises(HandshakeError):
        late.feed(take(guest))


def test_restart_after_the_guests_agent_was_restarted():
    guest, host = new_guest(), HostHandshake(SECRET)
    guest.feed(host.hello())
    proof, _ = host.feed(take(guest))
    guest = new_guest()  # knows nothing of the challenge
    guest.feed(proof)
    assert take(guest) == b""
    host.restart()
    assert host.unanswered
    join(guest, host)
    assert works(guest, host)


_noise = st.lists(
    st.binary(max_size=80)
    | st.sampled_from([MAGIC, MAGIC[:9], HostHandshake(SECRET).hello(), wire.frame(FrameType.CLOSE, 0, b"x")])
    | st.builds(
        lambda kind, payload: MAGIC + wire.frame(kind, 0, payload),
        st.integers(0, 9),
        st.binary(max_size=40) | st.sampled_from([32, 34, 96]).map(bytes),
    ),
    max_size=20,
)


@given(_noise, st.booleans())
def test_no_noise_upsets_the_guest(noise, in_session):
    guest = new_guest()
    if in_session:
        join(guest, HostHandshake(SECRET))
    for data in noise:
        for event in guest.feed(data):
            assert isinstance(event, SessionLost | Message)
        take(guest)
    guest.end_session("the test goes on")
    host = HostHandshake(SECRET)
    join(guest, host)
    assert works(guest, host)


@given(_noise)
def test_no_noise_upsets_the_host(noise):
    host = HostHandshake(SECRET)
    for data in noise:
        assert host.feed(data) == (b"", [])
    guest = new_guest()
    join(guest, host)
    assert works(guest, host)


def test_messages_in_front_of_the_end_of_their_session_are_delivered():
    guest, host = new_guest(), HostHandshake(SECRET)
    join(guest, host)
    host.mux.send(Channel.CONTROL, [b"interrupt"])
    stream = take(host.mux)
    host.mux.close("done")
    message, lost = guest.feed(stream + take(host.mux))
    assert message.parts == [b"interrupt"]
    assert isinstance(lost, SessionLost)
