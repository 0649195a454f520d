"""JSON-RPC 2.0 (https://www.jsonrpc.org/specification) as the guest's end: parses a request, finds the method, makes the answer.

Standard library only. Knows nothing of how bytes travel; the agent passes in a message's part and sends what comes back.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from guest_runtime.wire import FrameError, dump_json, load_json

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
FAILED = -32000


class RpcError(Exception):
    """A call that failed in a way that the caller should know.

    Args:
        message: what failed.
        code: JSON-RPC error code.
        data: anything that JSON can hold.
    """

    def __init__(self, message: str, *, code: int = FAILED, data: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.data = data


@dataclass(frozen=True)
class Method:
    """One method: what to call, and whether it may take longer than an instant and so belongs into a thread."""

    function: Callable[..., Any]
    slow: bool = False


@dataclass(frozen=True)
class Call:
    """A valid request for a method that exists. `id` is None for a notification, which gets no answer."""

    method: Method
    params: Mapping[str, Any]
    id: int | str | None

    def run(self) -> bytes | None:
        """Call the method and return the answer to send."""
        try:
            result = self.method.function(**self.params)
            answer = dump_json({"jsonrpc": "2.0", "result": result, "id": self.id})
        except RpcError as error:
            answer = _error(self.id, error.code, str(error), error.data)
        except Exception as error:
            answer = _error(self.id, INTERNAL_ERROR, f"{type(error).__name__}: {error}")
        return None if self.id is None else answer


def parse(part: bytes, methods: Mapping[str, Method]) -> Call | bytes:
    """Return the call that a message asks for, or the answer that says what is wrong with it."""
    try:
        request = load_json(part)
    except FrameError as error:
        return _error(None, PARSE_ERROR, str(error))
    if not isinstance(request, dict) or request.get("jsonrpc") != "2.0" or not isinstance(request.get("method"), str):
        return _error(None, INVALID_REQUEST, "not a JSON-RPC 2.0 request object")
    identity = request.get("id")
    if isinstance(identity, bool) or not isinstance(identity, int | str | None):
        return _error(None, INVALID_REQUEST, "the id must be a number or a string")
    method = methods.get(request["method"])
    if method is None:
        return _error(identity, METHOD_NOT_FOUND, f"there is no method {request['method'][:100]!r}")
    params = request.get("params", {})
    if not isinstance(params, dict):
        return _error(identity, INVALID_PARAMS, "parameters are given by name")
    try:
        inspect.signature(method.function).bind(**params)
    except TypeError as error:
        return _error(identity, INVALID_PARAMS, str(error))
    return Call(method, params, identity)


def notification(method: str, params: Mapping[str, Any]) -> bytes:
    """Return a message that tells the host something without being asked."""
    return dump_json({"jsonrpc": "2.0", "method": method, "params": dict(params)})


def _error(identity: int | str | None, code: int, message: str, data: Any = None) -> bytes:
    error: dict[str, Any] = {"code": code, "message": message}
    if data is not None:
        error["data"] = data
    return dump_json({"jsonrpc": "2.0", "error": error, "id": identity})
