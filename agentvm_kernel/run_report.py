"""What `agentvm run` shows on the terminal: a line for each cell, and what runs right now.

Text from notebooks and guests is made printable first: escape sequences in it could drive the user's terminal.
"""

import re
from types import TracebackType

from nbformat import NotebookNode
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

SOURCE_LINES = 10
TRACEBACK_LINES = 40
_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|[ -/]*[0-~])")
# C0 without tab and newline, DEL, C1, and the marks that reorder text.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return text without escape sequences, with other control characters replaced."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", _ESCAPES.sub("", text))


class Report:
    """Progress of one execution, as a context manager.

    Args:
        console: where to; a terminal also gets a line that moves.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._live = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._live.add_task("")
        self._line = ""

    def __enter__(self) -> "Report":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._live.stop()

    def starting(self, what: str) -> None:
        """The machine or kernel is being started."""
        self._line = f"starting the {what}"
        self._live.reset(self._task, description=self._line)

    def stage(self, text: str) -> None:
        """What the start is at; a slow one has several stages."""
        self._live.update(self._task, description=f"{self._line}: {text}")
        if not self._console.is_terminal:
            self._console.print(Text(f"            {text}"))

    def started(self, seconds: float) -> None:
        """It is ready."""
        self._print("✓", "green", seconds, self._line)

    def cell_begins(self, number: int, count: int, source: str) -> None:
        """A cell is executed now."""
        width = len(str(count))
        first = next((line.strip() for line in source.splitlines() if line.strip()), "")
        excerpt = printable(first)
        self._line = f"[{number:>{width}}/{count}] {excerpt if len(excerpt) <= 60 else excerpt[:59] + '…'}"
        self._live.reset(self._task, description=self._line)

    def cell_ends(self, seconds: float, *, failed: bool) -> None:
        """The cell has been executed."""
        self._print("✗" if failed else "✓", "red" if failed else "green", seconds, self._line)

    def show_failure(self, cell: NotebookNode) -> None:
        """Show the source of a failed cell and its traceback."""
        lines = printable(cell.source).splitlines()
        for number, line in enumerate(lines[:SOURCE_LINES], start=1):
            self._console.print(Text(f"  {number:>3} | {line}", style="dim"))
        if len(lines) > SOURCE_LINES:
            self._console.print(Text(f"      … {len(lines) - SOURCE_LINES} more lines", style="dim"))
        error = next((output for output in reversed(cell.outputs) if output.output_type == "error"), None)
        if error is not None:
            traceback = printable("\n".join(error.traceback)).splitlines()
            if len(traceback) > TRACEBACK_LINES:
                half = TRACEBACK_LINES // 2
                traceback = [*traceback[:half], f"… {len(traceback) - 2 * half} lines", *traceback[-half:]]
            self._console.print(Text("\n".join(traceback)))

    def note(self, text: str) -> None:
        """Say something."""
        self._console.print(Text(text))

    def error(self, message: str, hint: str) -> None:
        """Say what went wrong, last."""
        text = Text("agentvm: ", style="bold red")
        text.append(message, style="not bold default")
        self._console.print(text)
        for line in hint.splitlines():
            self._console.print(Text(f"         {line}"))

    def _print(self, mark: str, style: str, seconds: float, line: str) -> None:
        text = Text(mark, style=style)
        text.append(f" {seconds:6.2f} s  {line}", style="default")
        self._console.print(text)
