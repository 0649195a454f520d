"""The guest's end of JSON-RPC 2.0, by the examples and rules of the specification."""

import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_runtime import identity, methods, rpc

METHODS = {
    "subtract": rpc.Method(lambda minuend, subtrahend: minuend - subtrahend),
    "fail": rpc.Method(lambda: (_ for _ in ()).throw(rpc.RpcError("no", code=-32001, data={"why": 1}))),
    "crash": rpc.Method(lambda: 1 / 0),
    "odd": rpc.Method(lambda: object()),
}


def ask(request: Any) -> Any:
    call = rpc.parse(request if isinstance(request, bytes) else json.dumps(request).encode(), METHODS)
    answer = call if isinstance(call, bytes) else call.run()
    return None if answer is None else json.loads(answer)


def test_a_call_is_answered_with_its_id() -> None:
    params = {"minuend": 42, "subtrahend": 23}
    assert ask({"jsonrpc": "2.0", "method": "subtract", "params": params, "id": 3}) == {
        "jsonrpc": "2.0",
        "result": 19,
        "id": 3,
    }


def test_a_notification_is_not_answered() -> None:
    assert ask({"jsonrpc": "2.0", "method": "subtract", "params": {"minuend": 1, "subtrahend": 1}}) is None


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"{", rpc.PARSE_ERROR),
        (b"\xff", rpc.PARSE_ERROR),
        (b"[" * 100_000, rpc.PARSE_ERROR),
        (b"NaN", rpc.PARSE_ERROR),
        ([], rpc.INVALID_REQUEST),
        ({"method": "subtract", "id": 1}, rpc.INVALID_REQUEST),
        ({"jsonrpc": "2.0", "method": 1, "id": 1}, rpc.INVALID_REQUEST),
        ({"jsonrpc": "2.0", "method": "subtract", "id": [1]}, rpc.INVALID_REQUEST),
        ({"jsonrpc": "2.0", "method": "nothing", "id": 1}, rpc.METHOD_NOT_FOUND),
        ({"jsonrpc": "2.0", "method": "subtract", "params": {"minuend": 1}, "id": 1}, rpc.INVALID_PARAMS),
        ({"jsonrpc": "2.0", "method": "subtract", "params": [1, 2, 3], "id": 1}, rpc.INVALID_PARAMS),
        ({"jsonrpc": "2.0", "method": "crash", "id": 1}, rpc.INTERNAL_ERROR),
        ({"jsonrpc": "2.0", "method": "odd", "id": 1}, rpc.INTERNAL_ERROR),
    ],
)
def test_what_is_wrong_gets_the_specifications_code(request_: Any, code: int) -> None:
    answer = ask(request_)
    assert answer["error"]["code"] == code
    assert answer["jsonrpc"] == "2.0"


def test_an_error_keeps_its_code_and_data() -> None:
    assert ask({"jsonrpc": "2.0", "method": "fail", "id": 1})["error"] == {
        "code": -32001,
        "message": "no",
        "data": {"why": 1},
    }


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything(data: bytes) -> None:
    rpc.parse(data, METHODS)


def test_what_a_machine_tells_about_itself() -> None:
    assert methods.ping() == "pong"
    assert methods.info()["pid"] > 0
    system = methods.system()
    assert 0 < system["memory_available"] <= system["memory_total"]
    assert "lo" in [interface["name"] for interface in methods.network()]
    assert "127.0.0.1/8" in next(i for i in methods.network() if i["name"] == "lo")["addresses"]
    assert any(disk["mount"] == "/" and 0 < disk["free"] <= disk["size"] for disk in methods.disks())


@pytest.mark.parametrize("name", ["", "a b", "-a", "a.b", "A", "a" * 64, "a\n", "../x"])
def test_a_wrong_host_name_is_refused_before_anything_is_written(name: str) -> None:
    with pytest.raises(ValueError, match="not a host name"):
        identity.set_hostname(name)


def test_a_wrong_machine_id_is_refused() -> None:
    with pytest.raises(ValueError, match="32 hexadecimal digits"):
        identity.set_machine_id("x" * 32)


def test_threads_are_all_that_a_slow_method_needs() -> None:
    call = rpc.parse(b'{"jsonrpc":"2.0","method":"subtract","params":{"minuend":2,"subtrahend":1},"id":"a"}', METHODS)
    assert isinstance(call, rpc.Call)
    answers: list[bytes | None] = []
    thread = threading.Thread(target=lambda: answers.append(call.run()))
    thread.start()
    thread.join()
    assert json.loads(answers[0] or b"")["id"] == "a"
