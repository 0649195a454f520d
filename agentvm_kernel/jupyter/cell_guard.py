"""Ends cells that run too long, and cuts off output that is too much. Both say so in the cell. Imports nothing heavy."""

from collections.abc import Callable

from agentvm_kernel.errors import MachineError
from agentvm_kernel.jupyter.guest_messages import GuestMessage
from agentvm_kernel.jupyter.requests import Request
from agentvm_kernel.sandbox.settings import CellLimits

GRACE_S = 10.0
"""So long a cell may take to notice that it was interrupted, in seconds."""
MAX_ERROR = 64 * 1024
OUTPUTS = frozenset({"stream", "display_data", "update_display_data", "execute_result", "error"})

CallLater = Callable[[float, Callable[[], None]], None]


class CellTimeout(MachineError):  # noqa: N818 (named after what happened)
    """A cell ran longer than the cell timeout allows."""


class CellGuard:
    """Watches the cells that the guest runs.

    Args:
        call_later: calls something after so many seconds.
        interrupt: interrupts the guest's Python.
        end_python: ends it with everything in it, with an error for what was running.
        tell: writes a line to a cell's standard error.

    Attributes:
        limits: what a cell may use up; it may be changed at any time, and holds for the cells that begin then.
    """

    def __init__(
        self,
        call_later: CallLater,
        interrupt: Callable[[], None],
        end_python: Callable[[CellTimeout], None],
        tell: Callable[[Request, str], None],
    ) -> None:
        self.limits = CellLimits()
        self._call_later = call_later
        self._interrupt = interrupt
        self._end_python = end_python
        self._tell = tell
        self._running: dict[Request, float] = {}
        self._expired: dict[Request, CellTimeout] = {}
        self._shown: dict[Request, int] = {}

    def began(self, cell: Request) -> None:
        """The guest has begun with a cell."""
        seconds = self.limits.timeout_s
        if seconds:
            self._running[cell] = seconds
            self._call_later(seconds, lambda: self._time_is_up(cell, seconds))

    def ended(self, cell: Request) -> None:
        """The guest has answered a cell, or never will."""
        self._running.pop(cell, None)
        self._expired.pop(cell, None)

    def finished(self, cell: Request) -> None:
        """The guest has said that it is done with a cell and its output."""
        self._shown.pop(cell, None)

    def admits(self, cell: Request, message: GuestMessage, size: int) -> tuple[bool, str]:
        """Return whether an output of `size` bytes may be shown, and what to say after it.

        Text of which a part may be shown is cut short.
        """
        cap = self.limits.output_bytes
        if not cap or message.msg_type not in OUTPUTS:
            return True, ""
        if message.msg_type == "error" and size <= MAX_ERROR:
            return True, ""  # what ended a cell is worth knowing
        before = self._shown.get(cell, 0)
        if before > cap:
            return False, ""
        self._shown[cell] = before + size
        if before + size <= cap:
            return True, ""
        self._shown[cell] = cap + 1
        word = f"agentvm: the output of this cell is cut off here, at {cap_text(cap)} (%vm output changes that)."
        if message.msg_type != "stream":
            return False, word
        kept = str(message.content["text"]).encode("utf-8", "replace")[: cap - before].decode("utf-8", "ignore")
        message.content["text"] = f"{kept}\n"
        return True, word

    def amend(self, cell: Request, message: GuestMessage) -> None:
        """Where a cell's error comes from its time being up, say that in it."""
        expired = self._expired.get(cell)
        content = message.content
        if expired is not None and content.get("ename") == "KeyboardInterrupt":
            name = type(expired).__name__
            content["ename"], content["evalue"] = name, str(expired)
            content["traceback"] = [*content["traceback"], f"\x1b[0;31m{name}\x1b[0m: {expired}"]

    def _time_is_up(self, cell: Request, seconds: float) -> None:
        if cell not in self._running:
            return
        error = CellTimeout(f"The cell ran longer than {seconds:g} s.", hint="%vm timeout changes that limit.")
        self._expired[cell] = error
        self._tell(
            cell, f"agentvm: this cell has run for {seconds:g} s, which is the limit (%vm timeout): it is interrupted."
        )
        self._interrupt()
        self._call_later(GRACE_S, lambda: self._time_is_over(cell))

    def _time_is_over(self, cell: Request) -> None:
        error = self._expired.get(cell)
        if error is not None and cell in self._running:
            self._tell(cell, f"agentvm: it did not react within {GRACE_S:g} s, so its Python process is ended.")
            self._end_python(error)


def cap_text(size: int) -> str:
    """Return a number of bytes for people."""
    amount = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:g} {unit}" if amount == int(amount) else f"{amount:.1f} {unit}"


def describe(limits: CellLimits) -> dict[str, str]:
    """Return both limits in words."""
    return {
        "timeout": f"{limits.timeout_s:g} s" if limits.timeout_s else "none",
        "output": cap_text(limits.output_bytes) if limits.output_bytes else "no limit",
    }
