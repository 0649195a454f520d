"""Checks what a guest sends before a client sees it. The guest is hostile: nothing is relayed, everything is parsed
and rebuilt.

A message arrives as [header, parent_header, metadata, content, buffer…]. Of the headers only the type and the id of
the parent are read; the host writes its own. The content must have the shape that the message specification gives this
type (https://jupyter-client.readthedocs.io/en/stable/messaging.html); each type has one check below, which returns the
content to publish. What a user may be shown is decided there too. Imports nothing heavy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from agentvm_kernel.jupyter.wire import EMPTY, Buffer, WireError, parse_json

MAX_HEADER_BYTES = 64 * 1024
MAX_CONTENT_BYTES = 128 * 1024 * 1024
MAX_BUFFERS = 1000

Content = dict[str, Any]
Check = Callable[[Content], Content]


@dataclass(slots=True)
class GuestMessage:
    """A message from the guest whose form is right.

    `parent_id` is only a claim until it is found in the table. `date` is when the guest made the message, by its own
    clock: frontends show how long a cell took. It is empty where the guest gave none that makes sense.
    """

    msg_type: str
    parent_id: str
    date: str
    metadata: Content
    content: Content
    buffers: list[Buffer]


def parse(parts: Sequence[Buffer], checks: dict[str, Check]) -> GuestMessage | None:
    """Parse and check one message; None for one that has no parent, such as ipykernel's `starting`, since nobody asked
    for it.

    Args:
        parts: header, parent header, metadata, content and buffers.
        checks: the types that may come on this channel, IOPUB_CHECKS or one of the others below.

    Raises:
        WireError: the message breaks a limit, is of a type that must not come here, or is not shaped as its type must
            be.
    """
    if not 4 <= len(parts) <= 4 + MAX_BUFFERS:
        raise WireError(f"A guest message of {len(parts)} parts.")
    parent_id = parse_json(parts[1], max_bytes=MAX_HEADER_BYTES).get("msg_id")
    if parent_id is None:
        return None
    header = parse_json(parts[0], max_bytes=MAX_HEADER_BYTES)
    msg_type = header.get("msg_type")
    check = checks.get(msg_type) if isinstance(msg_type, str) else None
    if check is None:
        raise WireError(f"A guest message of type {str(msg_type)[:50]!r}.")
    metadata = {} if parts[2] == EMPTY else parse_json(parts[2], max_bytes=MAX_HEADER_BYTES)
    content = check(parse_json(parts[3], max_bytes=MAX_CONTENT_BYTES))
    return GuestMessage(
        msg_type=str(msg_type),
        parent_id=str(parent_id),
        date=_date(header.get("date")),
        metadata=metadata,
        content=content,
        buffers=list(parts[4:]),
    )


def _date(value: Any) -> str:
    """Rebuild a header's date; clients fail on what is not one, or cannot be converted between time zones."""
    try:
        date = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return ""
    if date.tzinfo is None or not 2000 <= date.year < 2200:
        return ""
    return date.isoformat()


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise WireError(f"A guest message whose {what} is not what the specification says.")


def _is_optional_dict(value: Any) -> bool:
    return value is None or type(value) is dict


def _count(value: Any) -> bool:
    return value is None or type(value) is int


def _status(content: Content) -> Content:
    # `starting` and `restarting` are the host's to say.
    _require(content.get("execution_state") in ("busy", "idle"), "execution_state")
    return {"execution_state": content["execution_state"]}


def _execute_input(content: Content) -> Content:
    # The code is replaced by the host's own copy.
    _require(_count(content.get("execution_count")), "execution_count")
    return {"code": "", "execution_count": content.get("execution_count")}


def _stream(content: Content) -> Content:
    _require(content.get("name") in ("stdout", "stderr"), "stream name")
    _require(type(content.get("text")) is str, "stream text")
    return {"name": content["name"], "text": content["text"]}


def _display(content: Content) -> Content:
    _require(type(content.get("data")) is dict, "data")
    _require(all(type(key) is str for key in content["data"]), "data")
    _require(_is_optional_dict(content.get("metadata")), "metadata")
    transient = content.get("transient")
    _require(_is_optional_dict(transient), "transient")
    checked = {"data": content["data"], "metadata": content.get("metadata") or {}}
    if transient is not None:
        _require(isinstance(transient.get("display_id", ""), str), "display_id")
        checked["transient"] = transient
    return checked


def _execute_result(content: Content) -> Content:
    _require(_count(content.get("execution_count")), "execution_count")
    return {**_display(content), "execution_count": content.get("execution_count")}


def _error(content: Content) -> Content:
    _require(type(content.get("ename")) is str and type(content.get("evalue")) is str, "error")
    traceback = content.get("traceback")
    _require(type(traceback) is list and all(type(line) is str for line in traceback), "traceback")
    return {"ename": content["ename"], "evalue": content["evalue"], "traceback": traceback}


def _clear_output(content: Content) -> Content:
    return {"wait": content.get("wait") is True}


def _comm(content: Content) -> Content:
    _require(type(content.get("comm_id")) is str, "comm_id")
    _require(_is_optional_dict(content.get("data")), "comm data")
    return {"comm_id": content["comm_id"], "data": content.get("data") or {}}


def _comm_open(content: Content) -> Content:
    # `target_module` would make the page load code of the guest's choice.
    _require(type(content.get("target_name")) is str, "target_name")
    return {**_comm(content), "target_name": content["target_name"]}


def _reply(content: Content) -> Content:
    _require(type(content.get("status")) is str, "status")
    return content


def _execute_reply(content: Content) -> Content:
    _require(content.get("status") in ("ok", "error", "aborted", "abort"), "status")
    _require(_count(content.get("execution_count")), "execution_count")
    payload = content.get("payload")
    _require(payload is None or (type(payload) is list and all(type(item) is dict for item in payload)), "payload")
    _require(_is_optional_dict(content.get("user_expressions")), "user_expressions")
    if content["status"] == "error":
        content = {**content, **_error(content)}
    return content


def _any_object(content: Content) -> Content:
    return content


def _input_request(content: Content) -> Content:
    _require(type(content.get("prompt", "")) is str, "prompt")
    return {"prompt": content.get("prompt", ""), "password": content.get("password") is True}


IOPUB_CHECKS: dict[str, Check] = {
    "status": _status,
    "execute_input": _execute_input,
    "stream": _stream,
    "display_data": _display,
    "update_display_data": _display,
    "execute_result": _execute_result,
    "error": _error,
    "clear_output": _clear_output,
    "debug_event": _any_object,
    "comm_open": _comm_open,
    "comm_msg": _comm,
    "comm_close": _comm,
}
# debug_reply is a DAP response, usage_reply a set of figures: neither has a status.
REPLY_CHECKS: dict[str, Check] = {
    "execute_reply": _execute_reply,
    "complete_reply": _reply,
    "inspect_reply": _reply,
    "history_reply": _reply,
    "is_complete_reply": _reply,
    "comm_info_reply": _reply,
    "debug_reply": _any_object,
    "usage_reply": _any_object,
    "create_subshell_reply": _reply,
    "delete_subshell_reply": _reply,
    "list_subshell_reply": _reply,
}
STDIN_CHECKS: dict[str, Check] = {"input_request": _input_request}
