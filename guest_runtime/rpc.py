"""JSON-RPC 2.0 (https://www.jsonrpc.org/specification) as the guest's end: parses a request, finds the method, makes the answer.

Everything but batches, which no host of ours sends: they are refused as invalid. Standard library only. Knows nothing of how bytes
travel; the agent passes in a message's part and sends what comes back.
"""

import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from guest_runtime.wire import MAX_RPC_MESSAGE, FrameError, dump_json, load_json

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
FAILED = -32000
BUSY = -32001

Id = int | float | str | None
_CHECKED: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,), dict: (dict,)}


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


class Method:
    """One method of the interface.

    Args:
        function: what to call. Parameters that it annotates with bool, int, float, str or dict get nothing else.
        slow: whether it may take longer than an instant, and so belongs into a thread.
    """

    def __init__(self, function: Callable[..., Any], *, slow: bool = False) -> None:
        self.function = function
        self.slow = slow
        self._signature = inspect.signature(function)

    def bind(self, params: Any) -> inspect.BoundArguments:
        """Return the arguments for a call.

        Raises:
            TypeError: these are not the method's parameters.
        """
        if isinstance(params, list):
            bound = self._signature.bind(*params)
        elif isinstance(params, dict):
            bound = self._signature.bind(**params)
        else:
            raise TypeError("params must be an object or an array")
        for name, value in bound.arguments.items():
            wanted = _CHECKED.get(self._signature.parameters[name].annotation)
            if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
                raise TypeError(f"{name!r} must be of type {wanted[-1].__name__}, not {type(value).__name__}")
        return bound


@dataclass(frozen=True)
class Call:
    """A valid request for a method that exists."""

    method: Method
    arguments: inspect.BoundArguments
    id: Id
    answered: bool
    """False for a notification."""

    def run(self) -> bytes | None:
        """Call the method and return the answer to send."""
        try:
            result = self.method.function(*self.arguments.args, **self.arguments.kwargs)
            answer = dump_json({"jsonrpc": "2.0", "result": result, "id": self.id})
            if len(answer) > MAX_RPC_MESSAGE - 64:
                raise RpcError(f"the answer has {len(answer)} bytes, more than the connection takes")
        except RpcError as error:
            answer = _error(self.id, error.code, str(error), error.data)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            answer = _error(self.id, INTERNAL_ERROR, f"{type(error).__name__}: {error}")
        return answer if self.answered else None


def parse(part: bytes, methods: Mapping[str, Method]) -> Call | bytes | None:
    """Return the call that a message asks for, or the answer that says what is wrong with it.

    None is a notification with something wrong: JSON-RPC leaves it without an answer.
    """
    try:
        request = load_json(part)
    except FrameError as error:
        return _error(None, PARSE_ERROR, str(error))
    if isinstance(request, list):
        return _error(None, INVALID_REQUEST, "batches are not taken")
    if not isinstance(request, dict) or request.get("jsonrpc") != "2.0" or not isinstance(request.get("method"), str):
        return _error(None, INVALID_REQUEST, "not a JSON-RPC 2.0 request object")
    identity = request.get("id")
    if isinstance(identity, bool) or not isinstance(identity, int | float | str | None):
        return _error(None, INVALID_REQUEST, "the id must be a number, a string or null")
    answered = "id" in request
    method = methods.get(request["method"])
    if method is None:
        answer = _error(identity, METHOD_NOT_FOUND, f"there is no method {request['method'][:100]!r}")
        return answer if answered else None
    try:
        return Call(method, method.bind(request.get("params", {})), identity, answered)
    except TypeError as error:
        return _error(identity, INVALID_PARAMS, str(error)) if answered else None


def notification(method: str, params: Mapping[str, Any]) -> bytes:
    """Return a message that tells the host something without being asked."""
    return dump_json({"jsonrpc": "2.0", "method": method, "params": dict(params)})


def _error(identity: Id, code: int, message: str, data: Any = None) -> bytes:
    error: dict[str, Any] = {"code": code, "message": message}
    if data is not None:
        error["data"] = data
    return dump_json({"jsonrpc": "2.0", "error": error, "id": identity})
