"""Whom the proxy works with on the host, as protocols: the clients' sockets, and whoever has the machine. Imports nothing heavy."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from agentvm_kernel.errors import AgentVMError
from agentvm_kernel.jupyter.connection_file import ConnectionInfo
from agentvm_kernel.jupyter.requests import Request
from agentvm_kernel.jupyter.wire import Buffer


class Outlet(Protocol):
    """Where messages to clients go; `sockets.ClientSockets` is one."""

    info: ConnectionInfo

    def backlog(self) -> int:
        """Return how many bytes wait for iopub subscribers."""

    def send(self, channel: str, frames: Sequence[Buffer]) -> None:
        """Send on shell, control or stdin."""

    def publish(self, frames: Sequence[Buffer]) -> None:
        """Send to all iopub subscribers."""


class Owner(Protocol):
    """Whoever has the machine: what the proxy cannot do by itself."""

    def machine_wanted(self) -> None:
        """A request waits for a machine."""

    def interrupt(self, done: Callable[[dict[str, Any]], None]) -> None:
        """Interrupt what runs in the guest, then call `done` with the content of the reply."""

    def shutdown(self) -> None:
        """A client asked the kernel to end and has its reply."""

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call something after a while."""

    def plan_cell(self, code: str) -> object:
        """Return how the host runs this cell; None when it is all the guest's."""

    def assist(self, msg_type: str, content: dict[str, Any]) -> dict[str, Any] | None:
        """Return the reply to a complete_request or inspect_request about a host magic; None where it is about something else."""

    def run_cell(self, request: Request) -> None:
        """Begin to run a cell that was planned; `run_part`, `publish` and then `end_cell` or `release_cell` follow."""

    def end_python(self, error: AgentVMError) -> None:
        """End the guest's Python process, answer what it was at with `error`, and start another one."""

    def interrupt_cell(self) -> None:
        """Interrupt what the host itself does for the cell that it runs."""
