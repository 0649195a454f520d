"""What every host magic is made of: options read by argparse, errors that say how it is used, help for `?`."""

import argparse
import shlex
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from agentvm_kernel.errors import AgentVMError

if TYPE_CHECKING:
    from agentvm_kernel.jupyter.magics.cell import Cell
    from agentvm_kernel.jupyter.magics.notebook import Notebook


class UsageError(AgentVMError):
    """A magic was not written as it has to be."""


def split_words(line: str) -> list[str]:
    """Return the words of a magic's line, without quotation marks; what follows a # is a comment.

    Raises:
        UsageError: a quotation mark is left open.
    """
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise UsageError(f"This cannot be read: {str(error).lower()}.", hint="Close the quotation mark.") from error


class Options(argparse.ArgumentParser):
    """Reads a magic's line; what does not fit is a UsageError."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(
            prog=name,
            description=description,
            add_help=False,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise a UsageError."""
        usage = " ".join(self.format_usage().removeprefix("usage:").split())
        raise UsageError(f"{message}.", hint=f"Usage: {usage}")

    def option_names(self) -> list[str]:
        """Return all options as they are written."""
        return [name for action in self._actions for name in action.option_strings]


class HostMagic(ABC):
    """One magic.

    Attributes:
        name: without percent signs.
        is_cell_magic: it takes the cell's other lines.
    """

    name: str
    is_cell_magic = False

    @abstractmethod
    def options(self) -> Options:
        """Return what reads its line and describes it."""

    @abstractmethod
    async def run(self, cell: "Cell", arguments: argparse.Namespace, body: str) -> None:
        """Do it.

        Raises:
            AgentVMError: it failed; shown as the cell's error.
        """

    def words(self, notebook: "Notebook", before: Sequence[str]) -> list[str]:
        """Return what could be written next, besides options.

        Args:
            notebook: may be asked, but not waited for.
            before: the complete words that stand before the cursor.
        """
        return []

    @property
    def written(self) -> str:
        """Its name as it is written in a cell."""
        return f"{'%%' if self.is_cell_magic else '%'}{self.name}"

    def help(self) -> str:
        """Return the text that `?` shows."""
        return self.options().format_help().removeprefix("usage: ")

    def read(self, words: Sequence[str], body: str | None) -> argparse.Namespace:
        """Read the words of its line, and see that it has the lines below exactly when it needs them.

        Raises:
            UsageError: it was written in another way.
        """
        if self.is_cell_magic and body is None:
            raise UsageError(
                f"%{self.name} needs lines to run.", hint=f"Write {self.written} on the first line of a cell."
            )
        if not self.is_cell_magic and body is not None:
            raise UsageError(f"%%{self.name} does not exist.", hint=f"Write {self.written}, on a line of its own.")
        return self.options().parse_args(words)
