"""The table of what clients asked: the only source of routing and parent headers, never the guest.

A guest names the request that it answers by its id; everything else about that request is looked up here. Imports
nothing heavy.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from agentvm_kernel.errors import AgentVMError
from agentvm_kernel.jupyter.guest_messages import GuestMessage
from agentvm_kernel.jupyter.wire import Buffer, ClientMessage, parse_json

MAX_ANSWERED = 4096
SHELL_TYPES = frozenset(
    {
        "execute_request",
        "complete_request",
        "inspect_request",
        "history_request",
        "is_complete_request",
        "comm_info_request",
    }
)
COMM_TYPES = frozenset({"comm_open", "comm_msg", "comm_close"})
CONTROL_TYPES = frozenset(
    {"debug_request", "usage_request", "create_subshell_request", "delete_subshell_request", "list_subshell_request"}
)
FORWARDED = {"shell": SHELL_TYPES | COMM_TYPES, "control": SHELL_TYPES | CONTROL_TYPES}
"""What the guest may be asked, by channel."""


class Progress(IntEnum):
    """How far the `status` messages of one request have come."""

    QUEUED = 0
    BUSY = 1
    IDLE = 2


@dataclass(slots=True, eq=False)
class Request:
    """One request of a client.

    Attributes:
        channel: `shell` or `control`; the reply goes out there.
        identities: ZeroMQ route to the client.
        header: the request's header as it came; parent header of all that follows from it.
        code: of an execute_request, until it has been published.
        silent: an execute_request that must not show anything.
        allow_stdin: an execute_request during which the guest may ask for input.
        progress: which status was published last.
        in_turn: of the main shell, where requests are served one after the other.
        in_guest: it was passed on.
        begun: the guest has said that it runs this cell.
        input_shown: its execute_input was published before the guest had it.
        content: of a cell, all that the client sent.
        metadata: likewise.
        stop_on_error: cells that wait are aborted when this one fails.
        plan: how the host runs this cell; None for the guest's.
        is_part: a part of such a cell, made by the host and run by the guest. `header` and `identities` are the cell's.
        on_done: of a part: called with the reply when that and `idle` have come, or with the error that ended it.
        reply: of a part, once it has come.
    """

    msg_id: str
    msg_type: str
    channel: str
    identities: list[bytes]
    header: Buffer
    code: str | None = None
    silent: bool = False
    allow_stdin: bool = False
    progress: Progress = Progress.QUEUED
    in_turn: bool = False
    in_guest: bool = False
    begun: bool = False
    input_shown: bool = False
    content: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    stop_on_error: bool = True
    plan: object = None
    is_part: bool = False
    on_done: Callable[[GuestMessage | AgentVMError], None] | None = None
    reply: GuestMessage | None = None

    @property
    def is_cell(self) -> bool:
        """Whether this runs code."""
        return self.msg_type == "execute_request"

    @property
    def stored(self) -> bool:
        """Whether this is a cell that counts and is kept in the history."""
        return self.is_cell and not self.silent and bool(self.content.get("store_history", True))

    @property
    def reply_type(self) -> str | None:
        """Type of the reply that is due; None for the comm messages, which have none."""
        return f"{self.msg_type.removesuffix('_request')}_reply" if self.msg_type.endswith("_request") else None


def read_request(channel: str, message: ClientMessage) -> Request:
    """Return what a client's message asks for. Raises WireError."""
    request = Request(
        msg_id=message.msg_id,
        msg_type=message.msg_type,
        channel=channel,
        identities=message.identities,
        header=message.parts[0],
        in_turn=channel == "shell" and not message.header.get("subshell_id"),
    )
    if request.is_cell:
        request.content = content = message.content()
        request.metadata = parse_json(message.parts[2], max_bytes=len(message.parts[2]))
        request.code = str(content.get("code", ""))
        request.silent = bool(content.get("silent", False))
        request.allow_stdin = bool(content.get("allow_stdin", False))
        request.stop_on_error = bool(content.get("stop_on_error", True))
    return request


class RequestTable:
    """Requests that wait for a reply, and the last MAX_ANSWERED others: a finished cell's threads may still print."""

    def __init__(self) -> None:
        self._pending: dict[str, Request] = {}
        self._answered: dict[str, Request] = {}

    def add(self, request: Request) -> None:
        """Remember a request that is forwarded, or will be once there is a machine."""
        if request.reply_type is None:
            self._keep(request)
        else:
            self._pending[request.msg_id] = request

    def pending(self, msg_id: str) -> Request | None:
        """Return the request with this id when its reply is still due."""
        return self._pending.get(msg_id)

    def known(self, msg_id: str) -> Request | None:
        """Return the request with this id, answered or not."""
        return self._pending.get(msg_id) or self._answered.get(msg_id)

    def has_pending(self, channel: str) -> bool:
        """Whether a reply is due on this channel."""
        return any(request.channel == channel for request in self._pending.values())

    def has_unfinished(self) -> bool:
        """Whether `idle` is due for something that was answered."""
        return any(request.progress is Progress.BUSY for request in self._answered.values())

    def running(self) -> list[Request]:
        """Return the cells that have begun and have no reply yet."""
        return [
            r
            for r in self._pending.values()
            if r.is_cell and r.progress is Progress.BUSY and not r.silent and not r.is_part
        ]

    def main_shell_busy(self) -> bool:
        """Whether the guest still works on a request of the main shell."""
        return any(request.in_guest and request.in_turn for request in self._pending.values())

    def next_cell(self) -> Request | None:
        """Return the cell that the guest runs in the main shell, or will run next."""
        cells = (request for request in self._pending.values() if request.in_guest and request.in_turn)
        return next((request for request in cells if request.is_cell), None)

    def elsewhere(self) -> list[Request]:
        """Return what the guest works on besides the main shell: cells on subshells, calls of the debugger."""
        return [request for request in self._pending.values() if request.in_guest and not request.in_turn]

    def answered(self, request: Request) -> None:
        """Note that the reply has been sent."""
        if self._pending.pop(request.msg_id, None) is not None:
            self._keep(request)

    def clear(self) -> list[Request]:
        """Forget everything, since the guest that knew of it is gone; return what still waits for a reply or `idle`."""
        unfinished = [*self._pending.values(), *(r for r in self._answered.values() if r.progress is Progress.BUSY)]
        self._pending.clear()
        self._answered.clear()
        return unfinished

    def _keep(self, request: Request) -> None:
        request.content = {}  # long code need not be kept with it
        self._answered[request.msg_id] = request
        if len(self._answered) > MAX_ANSWERED:
            del self._answered[next(iter(self._answered))]
