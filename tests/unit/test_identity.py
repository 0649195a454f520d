"""What a machine must confirm before anybody gets it: every part, one by one."""

from types import SimpleNamespace
from typing import Any

import pytest

from agentvm_kernel.errors import AuthenticationError, ConnectionClosed, MachineLost
from agentvm_kernel.sandbox import identity
from agentvm_kernel.sandbox.identity import connect_thawed, renew_identity, wake

PARTS = ("entropy", "time", "hostname", "machine_id", "boot_id", "secret")
OF_CLONES = ("reseed", "connections")


class Guest:
    """A connection to a guest that answers what it is told to."""

    def __init__(self, **answer: Any) -> None:
        self.answer = answer
        self.asked: dict[str, Any] = {}

    async def call(self, method: str, params: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        self.asked = {"method": method, **params}
        return self.answer


def machine() -> Any:
    return SimpleNamespace(name="agentvm-1", secret=b"old")


def all_but(part: str | None = None) -> dict[str, bool]:
    return {each: each != part for each in (*PARTS, *OF_CLONES)}


async def test_a_machine_that_confirms_everything_has_its_new_secret():
    one, guest = machine(), Guest(**all_but())
    await renew_identity(guest, one)
    assert len(one.secret) == 32
    assert guest.asked["hostname"] == "agentvm-1"
    assert len(guest.asked["machine_id"]) == 32


@pytest.mark.parametrize("part", [*PARTS, *OF_CLONES])
@pytest.mark.parametrize("answer", [False, None, 1, "true"])
async def test_what_is_not_confirmed_is_named_and_the_machine_is_lost(part, answer):
    one = machine()
    with pytest.raises(MachineLost, match=rf"\({part}\)"):
        await renew_identity(Guest(**{**all_but(), part: answer}), one)
    assert one.secret == b"old"


async def test_a_users_own_machine_keeps_its_seeds_connections_and_name():
    one, guest = machine(), Guest(entropy=True, time=True, secret=True)
    await wake(guest, one, secret=b"new" * 11)
    assert set(guest.asked) == {"method", "entropy", "time_ns", "secret"}
    assert one.secret == b"new" * 11


async def test_no_two_renewals_send_the_same():
    guest = Guest(**all_but())
    seen = []
    for _ in range(2):
        await renew_identity(guest, machine())
        seen.append({key: guest.asked[key] for key in ("entropy", "machine_id", "secret", "time_ns")})
    assert not [key for key in seen[0] if seen[0][key] == seen[1][key]]


async def test_a_machine_that_does_not_confirm_its_clock_after_a_pause_is_lost():
    await wake(Guest(entropy=True, time=True, secret=False), machine())
    for answer in ({}, {"entropy": True}, {"entropy": True, "time": False}, {"entropy": True, "time": True}):
        with pytest.raises(MachineLost, match="clock"):
            await wake(Guest(**answer), machine())


class Reset:
    """Connections to a machine whose vsock is reset after it was thawed.

    Args:
        lost: so many connections end while the identity is renewed.
        taken: the machine has taken its new secret before that.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, lost: int, taken: bool) -> None:
        self.lost, self.taken, self.secret, self.closed = lost, taken, b"old", 0
        monkeypatch.setattr(identity, "open_connection", self.open)

    async def open(self, address: object, secret: bytes, *, timeout_s: float) -> "Reset":
        if secret != self.secret:
            raise AuthenticationError("wrong secret")
        return self

    async def call(self, method: str, params: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        if self.lost:
            self.lost -= 1
            if self.taken:
                self.secret = identity.base64.b64decode(params["secret"])
            raise ConnectionClosed("reset")
        self.secret = identity.base64.b64decode(params["secret"])
        return all_but()

    async def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("taken", [False, True])
async def test_a_connection_that_the_thaw_resets_is_made_anew(monkeypatch, taken):
    one = SimpleNamespace(name="agentvm-1", secret=b"old", address=None)
    guest = Reset(monkeypatch, lost=1, taken=taken)
    assert await connect_thawed(one, reseed=True, timeout_s=1) is guest
    assert guest.closed == 1
    assert one.secret == guest.secret != b"old"


async def test_a_machine_that_ends_every_connection_is_given_up(monkeypatch):
    guest = Reset(monkeypatch, lost=9, taken=False)
    with pytest.raises(ConnectionClosed):
        await connect_thawed(SimpleNamespace(name="m", secret=b"old", address=None), reseed=True, timeout_s=1)
    assert guest.closed == identity.CONNECTIONS


async def test_a_machine_that_does_not_know_its_secret_is_not_tried_with_another(monkeypatch):
    guest = Reset(monkeypatch, lost=0, taken=False)
    with pytest.raises(AuthenticationError):
        await connect_thawed(SimpleNamespace(name="m", secret=b"other", address=None), reseed=True, timeout_s=1)
    assert guest.closed == 0
