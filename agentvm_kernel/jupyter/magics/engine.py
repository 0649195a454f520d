"""Runs cells with host magics: part by part, here and in the guest, and to the client as one cell.

To the client it is one busy and idle, one execute_input with the code as it was written, all output, one reply. Of the parts for
the guest only the last one shows its last expression's value, counts, and is kept in the history; where a host magic comes last, the
guest runs that in silence, for the same purpose.
"""

import ast
from importlib import import_module
from typing import Any

from agentvm_kernel.errors import AgentVMError
from agentvm_kernel.jupyter.guest_messages import GuestMessage
from agentvm_kernel.jupyter.magics import assist, names
from agentvm_kernel.jupyter.magics.arguments import HostMagic, UsageError, split_words
from agentvm_kernel.jupyter.magics.cell import Cell, Interrupted
from agentvm_kernel.jupyter.magics.notebook import Notebook
from agentvm_kernel.jupyter.magics.split import Code, Part, split
from agentvm_kernel.jupyter.magics.split import HostMagic as MagicPart
from agentvm_kernel.jupyter.proxy import Proxy
from agentvm_kernel.jupyter.requests import Request
from agentvm_kernel.log import get_logger

log = get_logger(__name__)

MAX_WORD = 1000
NOT_SHOWN = "\nNone\n"
"""Makes the value of a part's last expression one that is not shown."""


def load_magics() -> dict[str, HostMagic]:
    """Import all magics; return them by name."""
    magics: dict[str, HostMagic] = {}
    for module in ("snapshots", "machine", "fork"):
        for magic in import_module(f"agentvm_kernel.jupyter.magics.{module}").MAGICS:
            magics[magic.name] = magic
    return magics


class HostCells:
    """The host's share in the cells of one notebook.

    Args:
        proxy: talks to client and guest.
        notebook: what the magics work on.
    """

    def __init__(self, proxy: Proxy, notebook: Notebook) -> None:
        self.notebook = notebook
        self.magics = load_magics()
        self._proxy = proxy
        self._cell: Cell | None = None

    def plan(self, code: str) -> list[Part] | None:
        """Return the parts that a cell is run in; none where the guest just runs it after an automatic snapshot.

        Returns:
            None where the cell is all the guest's.
        """
        parts = split(code) if names.mentions(code) else []
        return parts if parts or self.notebook.checkpoints else None

    def assist(self, msg_type: str, content: dict[str, Any]) -> dict[str, Any] | None:
        """Answer a complete_request or inspect_request about a host magic; None where it is about something else."""
        code, cursor = content.get("code"), content.get("cursor_pos")
        if not isinstance(code, str) or not isinstance(cursor, int):
            return None
        if msg_type == "inspect_request":
            return assist.inspect(self.magics, code, cursor)
        return assist.complete(self.magics, self.notebook, code, cursor)

    def interrupt(self) -> None:
        """Tell the magic that runs now; what runs in the guest gets its own interrupt."""
        if self._cell is not None:
            self._cell.interrupted.set()

    async def run(self, request: Request) -> None:
        """Run a planned cell and answer it."""
        parts: list[Part] = request.plan if isinstance(request.plan, list) else []
        cell = self._cell = Cell(self._proxy, request, self.notebook)
        try:
            if self.notebook.checkpoints and _changes_something(parts):
                await self._checkpoint(cell)
            if not parts:
                self._proxy.release_cell()
                return
            self._proxy.show_input(request)
            content, of_guest = await self._run_parts(cell, parts)
        except Exception as error:
            # Whatever it is: a cell without an answer would block all that follow.
            log.error("host_cell", exc_info=True)
            content, of_guest = _shown(cell, error), None
        finally:
            self._cell = None
        self._proxy.end_cell(request, content, of_guest)

    async def _checkpoint(self, cell: Cell) -> None:
        try:
            async with cell.machine_standing_still():
                made = await self.notebook.checkpoint()
            problem = "" if made else "it could not be written"
        except AgentVMError as error:
            problem = str(error)
        if problem:
            # The cell does not depend on it, but whoever relies on %undo has to know.
            cell.write(f"agentvm: no automatic snapshot was made before this cell: {problem}", name="stderr")

    async def _run_parts(self, cell: Cell, parts: list[Part]) -> tuple[dict[str, Any], GuestMessage | None]:
        """Run one part after the other; return the reply's content, and the guest's last reply."""
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            try:
                if isinstance(part, MagicPart):
                    await self._run_magic(cell, part)
                else:
                    code = part.text if is_last else part.text + NOT_SHOWN
                    reply = await cell.run_guest(
                        code, store=is_last and cell.stores, expressions=cell.expressions if is_last else None
                    )
                    self.notebook.touched()
                    if is_last:
                        return {**reply.content, **cell.payload(reply.content)}, reply
                    if reply.content["status"] != "ok":
                        return await self._finish(cell, parts, reply.content)
                if cell.interrupted.is_set():
                    raise Interrupted("The cell was interrupted.")
            except AgentVMError as error:
                return await self._finish(cell, parts, _shown(cell, error))
            except Exception as error:
                log.error("host_magic", exc_info=True)
                return await self._finish(cell, parts, _shown(cell, error))
        return await self._finish(cell, parts, {"status": "ok"})

    async def _finish(
        self, cell: Cell, parts: list[Part], content: dict[str, Any]
    ) -> tuple[dict[str, Any], GuestMessage | None]:
        """Have the guest count the cell, unless it cannot; return the reply's content, and the guest's last reply."""
        magic = next(part for part in reversed(parts) if isinstance(part, MagicPart))
        succeeded = content["status"] == "ok"
        answer: dict[str, Any] = {"execution_count": self._proxy.next_count, "user_expressions": {}, **content}
        reply = None
        if cell.stores or cell.expressions:
            # What was written in a wrong way would be an error there.
            is_right = not magic.wants_help and (magic.body is not None) == self.magics[magic.name].is_cell_magic
            code = magic.source if is_right else "%vm"
            try:
                reply = await cell.run_guest(
                    code, store=cell.stores, expressions=cell.expressions if succeeded else None, done=True
                )
            except AgentVMError as error:
                log.debug("cell_not_counted", error=str(error))
            else:
                answer |= {
                    key: reply.content[key] for key in ("execution_count", "user_expressions") if key in reply.content
                }
        return {**answer, **cell.payload(content)}, reply

    async def _run_magic(self, cell: Cell, part: MagicPart) -> None:
        magic = self.magics[part.name]
        if part.wants_help:
            cell.pages.append(magic.help())
            return
        words = await self._expand(cell, split_words(part.line))
        arguments = magic.read(words, part.body)
        await magic.run(cell, arguments, part.body or "")

    async def _expand(self, cell: Cell, words: list[str]) -> list[str]:
        """Put the values of the user's variables into the words, as IPython does: `%snapshot step-{number}`.

        The guest gives them, and it is hostile: a word stays one word, and does not become an option.
        """
        variable = {str(at): word for at, word in enumerate(words) if "{" in word or "$" in word}
        if not variable:
            return words
        expressions = {at: f"get_ipython().var_expand({word!r})" for at, word in variable.items()}
        reply = await cell.run_guest("", expressions=expressions)
        values = reply.content.get("user_expressions") or {}
        expanded = list(words)
        for at, word in variable.items():
            value = _text_of(values.get(at))
            if value is None or (value.startswith("-") and not word.startswith("-")):
                raise UsageError(f"{word!r} has no value that could stand here.")
            expanded[int(at)] = value
        return expanded


def _text_of(result: Any) -> str | None:
    """Return the string that an expression has given, None where it has given something else."""
    try:
        value = ast.literal_eval(result["data"]["text/plain"][:MAX_WORD])
    except (KeyError, TypeError, ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, str) else None


def _changes_something(parts: list[Part]) -> bool:
    """Return whether the guest runs the user's code in a cell, and it does not move the machine elsewhere anyway."""
    moves = any(isinstance(part, MagicPart) and part.name in ("restore", "undo") for part in parts)
    return not parts or (not moves and any(isinstance(part, Code) for part in parts))


def _shown(cell: Cell, error: Exception) -> dict[str, Any]:
    """Show an error in the cell; return the reply's content."""
    if isinstance(error, Interrupted):
        ename, evalue = "KeyboardInterrupt", error.message
    elif isinstance(error, AgentVMError):
        ename, evalue = type(error).__name__, str(error)
    else:
        ename, evalue = "MachineError", f"Something unexpected went wrong on the host: {type(error).__name__}: {error}"
    content = {"ename": ename, "evalue": evalue, "traceback": [f"\x1b[0;31m{ename}\x1b[0m: {evalue}"]}
    cell.show_error(content)
    return {"status": "error", **content}
