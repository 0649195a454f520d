"""A cell that the host runs, as the magics in it see it: where output goes, and how to have something run in the guest."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from agentvm_kernel.errors import AgentVMError, MachineError
from agentvm_kernel.jupyter.guest_messages import GuestMessage
from agentvm_kernel.jupyter.magics.notebook import Notebook
from agentvm_kernel.jupyter.proxy import Proxy
from agentvm_kernel.jupyter.requests import Request

OTHERS_S = 5.0
"""So long a magic that needs the machine to stand still waits for cells on subshells and for the debugger, in seconds."""
_LOOK_S = 0.05
DONE = {"agentvm": "done"}
"""Metadata that let the guest's magic of the same name pass in silence (see guest_runtime.kernel_launcher)."""


class Interrupted(AgentVMError):  # noqa: N818 (shown as KeyboardInterrupt)
    """The user interrupted the cell while the host was at work."""


class Cell:
    """One cell on its way through host and guest.

    Args:
        proxy: what talks to the client.
        request: the client's execute_request.
        notebook: whose cell it is.

    Attributes:
        interrupted: set when the user interrupts it.
        pages: texts that the client shall show in its pager.
    """

    def __init__(self, proxy: Proxy, request: Request, notebook: Notebook) -> None:
        self.notebook = notebook
        self.request = request
        self.interrupted = asyncio.Event()
        self.pages: list[str] = []
        self._proxy = proxy
        content = request.content
        self.stores = request.stored
        expressions = content.get("user_expressions")
        self.expressions: dict[str, Any] = expressions if isinstance(expressions, dict) else {}

    # ---- output

    def write(self, text: str, *, name: str = "stdout") -> None:
        """Show text as if it had been printed."""
        self._publish("stream", {"name": name, "text": text if text.endswith("\n") else f"{text}\n"})

    def display(self, data: dict[str, str], *, display_id: str = "", update: bool = False) -> None:
        """Show something in several forms.

        Args:
            data: by MIME type; text/plain at least.
            display_id: names the output, so that it can be updated.
            update: change the output of this name instead.
        """
        content: dict[str, Any] = {"data": data, "metadata": {}}
        if display_id:
            content["transient"] = {"display_id": display_id}
        self._publish("update_display_data" if update else "display_data", content)

    def show_error(self, content: dict[str, Any]) -> None:
        """Show an error's name, value and traceback."""
        self._publish("error", {key: content[key] for key in ("ename", "evalue", "traceback")})

    def _publish(self, msg_type: str, content: dict[str, Any]) -> None:
        if not self.request.silent:
            self._proxy.publish(self.request, msg_type, content)

    # ---- the guest

    async def run_guest(
        self, code: str, *, store: bool = False, expressions: dict[str, Any] | None = None, done: bool = False
    ) -> GuestMessage:
        """Have the guest run code as a part of this cell, and return its reply after all output.

        Args:
            code: what to run.
            store: count it and keep it in the history.
            expressions: user_expressions of the request.
            done: it consists of a host magic that has been run.

        Raises:
            AgentVMError: there is no machine, or it went away.
        """
        answered: asyncio.Future[GuestMessage] = asyncio.get_running_loop().create_future()

        def on_done(result: GuestMessage | AgentVMError) -> None:
            if answered.done():
                return
            if isinstance(result, GuestMessage):
                answered.set_result(result)
            else:
                answered.set_exception(result)

        content = {
            "code": code,
            "silent": self.request.silent,
            "store_history": store,
            "user_expressions": expressions or {},
            "allow_stdin": self.request.allow_stdin,
            # Whether the rest is aborted is the host's to say.
            "stop_on_error": False,
        }
        metadata = {**self.request.metadata, **(DONE if done else {})}
        self._proxy.run_part(self.request, content, metadata, on_done)
        return await answered

    @contextlib.asynccontextmanager
    async def machine_standing_still(self) -> AsyncIterator[None]:
        """Keep everything of all clients from the guest, so that it can be frozen or replaced.

        Raises:
            MachineError: something else runs in it and does not end.
        """
        deadline = asyncio.get_running_loop().time() + OTHERS_S
        while self._proxy.others_in_guest():
            if asyncio.get_running_loop().time() > deadline:
                raise MachineError(
                    "The machine is at work for another client, on a subshell or in the debugger.",
                    hint="Let that end and try again.",
                )
            await asyncio.sleep(_LOOK_S)
        self._proxy.stand_still(True)
        try:
            yield
        finally:
            self._proxy.stand_still(False)

    def payload(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return the reply's payload: what the guest gave, and our pages."""
        pages = [{"source": "page", "data": {"text/plain": page}, "start": 0} for page in self.pages]
        given = content.get("payload")
        return {"payload": [*(given if isinstance(given, list) else []), *pages]}
