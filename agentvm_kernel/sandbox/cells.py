"""Runs cells in a guest's ipykernel for programs, and collects what they show.

On a connection a Jupyter message is [header, parent_header, metadata, content, *buffers] in JSON, without identities and signature
(https://jupyter-client.readthedocs.io/en/stable/messaging.html). The guest is hostile: what it sends is parsed with bounds, and only
strings and plain JSON get into a `Result`. Imports nothing heavy.
"""

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from agentvm_kernel.errors import ExecutionError, MachineError, MachineLost
from agentvm_kernel.sandbox.lease import Lease
from guest_runtime import wire
from guest_runtime.wire import Channel

MAX_HEADER = 64 * 1024
MAX_OUTPUT = 64 * 1024 * 1024
"""What one cell may show, in bytes; the rest is left out."""
INTERRUPT_S = 10.0
"""How long a cell may take to notice that its time is over."""


@dataclass(frozen=True)
class CellError:
    """The exception that ended a cell.

    Attributes:
        name: its class.
        message: its text.
        traceback: lines as IPython shows them, with colours (ANSI).
    """

    name: str
    message: str
    traceback: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What came of one cell.

    Attributes:
        stdout: what it printed.
        stderr: what it printed to standard error.
        value: text of its last expression; None where it had none.
        outputs: everything that it showed, in order, in the form of nbformat's outputs.
        error: what ended it; None where it went well.
        duration_s: how long it took, in seconds.
        truncated: it showed more than is kept.
    """

    stdout: str
    stderr: str
    value: str | None
    outputs: list[dict[str, Any]]
    error: CellError | None
    duration_s: float
    truncated: bool = False

    @property
    def ok(self) -> bool:
        """Whether it went well."""
        return self.error is None

    @property
    def text(self) -> str:
        """All text that it showed, in order, as a terminal would."""
        return "".join(_text_of(output) for output in self.outputs)

    def require_ok(self) -> "Result":
        """Return this result.

        Raises:
            ExecutionError: the cell failed.
        """
        if self.error is not None:
            raise ExecutionError(f"The cell failed: {self.error.name}: {self.error.message}")
        return self


@dataclass
class _Cell:
    """A cell under way."""

    outputs: list[dict[str, Any]] = field(default_factory=list)
    size: int = 0
    truncated: bool = False
    reply: dict[str, Any] | None = None
    idle: bool = False
    on_output: Callable[[list[dict[str, Any]]], None] | None = None
    done: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def check(self) -> None:
        if self.reply is not None and self.idle and not self.done.done():
            self.done.set_result(None)


class Cells:
    """Runs cells, one at a time, on one lease."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._session = uuid.uuid4().hex
        self._lock = asyncio.Lock()
        self._id = ""
        self._cell: _Cell | None = None
        self._died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        connection = lease.connection
        connection.on_message[Channel.SHELL] = self._guarded(self._on_reply)
        connection.on_message[Channel.IOPUB] = self._guarded(self._on_output)
        connection.on_message[Channel.STDIN] = lambda parts: None  # nobody is there to be asked; allow_stdin says so
        connection.on_message[Channel.CONTROL] = lambda parts: None
        connection.on_notification = self._on_notification

    async def run(
        self,
        code: str,
        timeout_s: float | None = None,
        *,
        store: bool = True,
        on_output: Callable[[list[dict[str, Any]]], None] | None = None,
    ) -> Result:
        """Run a cell. What it raises is in the result.

        Args:
            code: of the cell.
            timeout_s: how long it may take, in seconds; it is interrupted then, and the result's error is a TimeoutError.
            store: count it and keep it in the history.
            on_output: called with all outputs so far whenever there are more.

        Raises:
            MachineLost: the machine or its Python ended meanwhile.
            MachineError: the time was over and the cell did not react to being interrupted; it still runs.
        """
        async with self._lock:
            began = time.monotonic()
            cell = self._cell = _Cell(on_output=on_output)
            self._send(code, store)
            expired = not await self._wait(cell, timeout_s)
            if expired:
                await self._lease.connection.call("kernel.interrupt")
                if not await self._wait(cell, INTERRUPT_S):
                    raise MachineError(
                        f"A cell did not end within {timeout_s:g} s and does not react to being interrupted.",
                        hint="Restore a snapshot, or close the sandbox.",
                    )
            self._cell = None
            return _result(cell, time.monotonic() - began, timeout_s if expired else None)

    def _send(self, code: str, store: bool) -> None:
        self._id = uuid.uuid4().hex
        header = {
            "msg_id": self._id,
            "msg_type": "execute_request",
            "session": self._session,
            "username": "agentvm",
            "version": "5.3",
            "date": datetime.now(UTC).isoformat(),
        }
        content = {"code": code, "silent": False, "store_history": store, "allow_stdin": False, "stop_on_error": True}
        parts = [wire.dump_json(header), b"{}", b"{}", wire.dump_json(content)]
        self._lease.connection.send(Channel.SHELL, parts)

    async def _wait(self, cell: _Cell, timeout_s: float | None) -> bool:
        """Wait for the end of a cell; False when it did not come in time."""
        ends: set[asyncio.Future[Any]] = {cell.done, self._lease.lost, self._died}
        done, _ = await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if cell.done in done:
            return True
        for story in (self._died, self._lease.lost):
            if story in done:
                raise MachineLost(f"The cell did not end: {story.result()}.", hint="Restore a snapshot to go on.")
        return False

    # ---- what the guest sends

    def _guarded(self, handle: Callable[[str, dict[str, Any], dict[str, Any]], None]) -> Callable[[list[bytes]], None]:
        def on_message(parts: list[bytes]) -> None:
            if self._cell is None or len(parts) < 4 or max(map(len, parts[:3])) > MAX_HEADER:
                return
            if len(parts[3]) > MAX_OUTPUT:
                self._cell.truncated = True
                return
            try:
                header, parent, metadata, content = map(wire.load_json, parts[:4])
            except wire.FrameError:
                return  # ours are valid; what is not was made up
            kind = header.get("msg_type") if isinstance(header, dict) else None
            ours = isinstance(parent, dict) and parent.get("msg_id") == self._id
            if ours and isinstance(kind, str) and isinstance(content, dict):
                self._cell.size += len(parts[3])
                handle(kind, content, metadata if isinstance(metadata, dict) else {})

        return on_message

    def _on_reply(self, kind: str, content: dict[str, Any], metadata: dict[str, Any]) -> None:
        if self._cell is not None and kind == "execute_reply":
            self._cell.reply = content
            self._cell.check()

    def _on_output(self, kind: str, content: dict[str, Any], metadata: dict[str, Any]) -> None:
        cell = self._cell
        if cell is None:
            return
        if kind == "status":
            cell.idle = content.get("execution_state") == "idle"
            cell.check()
        elif cell.size > MAX_OUTPUT:
            cell.truncated = True
        elif kind == "stream":
            _add_text(cell.outputs, str(content.get("name")), str(content.get("text", "")))
        elif kind in ("display_data", "execute_result"):
            data = content.get("data")
            output: dict[str, Any] = {
                "output_type": kind,
                "data": data if isinstance(data, dict) else {},
                "metadata": metadata,
            }
            if kind == "execute_result":
                output["execution_count"] = content.get("execution_count")
            cell.outputs.append(output)
        elif kind == "error":
            lines = content.get("traceback")
            cell.outputs.append(
                {
                    "output_type": "error",
                    "ename": str(content.get("ename")),
                    "evalue": str(content.get("evalue")),
                    "traceback": [str(line) for line in lines] if isinstance(lines, list) else [],
                }
            )
        elif kind == "clear_output":
            cell.outputs.clear()
        if cell.on_output is not None:
            cell.on_output(cell.outputs)

    def _on_notification(self, method: str, params: Any) -> None:
        if method == "kernel.died" and not self._died.done():
            self._died.set_result("the Python process in the machine ended")


def _add_text(outputs: list[dict[str, Any]], name: str, text: str) -> None:
    if outputs and outputs[-1].get("output_type") == "stream" and outputs[-1]["name"] == name:
        outputs[-1]["text"] += text
    else:
        outputs.append({"output_type": "stream", "name": name, "text": text})


def _text_of(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return str(output["text"])
    if output["output_type"] == "error":
        return f"{output['ename']}: {output['evalue']}\n"
    return f"{output['data'].get('text/plain', '')}\n"


def _result(cell: _Cell, duration_s: float, expired_s: float | None) -> Result:
    reply = cell.reply or {}
    error = None
    if expired_s is not None:
        error = CellError("TimeoutError", f"The cell took longer than {expired_s:g} s.")
    elif reply.get("status") != "ok":
        lines = reply.get("traceback")
        error = CellError(
            str(reply.get("ename", "Error")),
            str(reply.get("evalue", reply.get("status"))),
            tuple(str(line) for line in lines) if isinstance(lines, list) else (),
        )
    streams = {"stdout": "", "stderr": ""}
    value = None
    for output in cell.outputs:
        if output["output_type"] == "stream" and output["name"] in streams:
            streams[output["name"]] += output["text"]
        elif output["output_type"] == "execute_result":
            value = str(output["data"].get("text/plain", ""))
    return Result(streams["stdout"], streams["stderr"], value, cell.outputs, error, duration_s, cell.truncated)
