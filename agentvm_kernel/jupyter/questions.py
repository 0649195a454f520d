"""`input()`: who was asked by which cell, and whose answer goes to the guest. Imports nothing heavy."""

from collections.abc import Callable, Sequence
from contextlib import suppress

from agentvm_kernel.errors import ConnectionClosed
from agentvm_kernel.jupyter import guest_messages
from agentvm_kernel.jupyter.client_messages import ClientMessages
from agentvm_kernel.jupyter.requests import Request, RequestTable
from agentvm_kernel.jupyter.wire import Buffer, ClientMessage, WireError
from agentvm_kernel.transport.connection import GuestConnection
from guest_runtime.wire import Channel


class Questions:
    """The cells that have asked for input and have no answer yet.

    Args:
        requests: all that is pending.
        clients: where questions go.
        drop: called with where and why for a message that does not belong here.
    """

    def __init__(self, requests: RequestTable, clients: ClientMessages, drop: Callable[[str, str], None]) -> None:
        self._requests = requests
        self._clients = clients
        self._drop = drop
        self._asking: list[Request] = []

    def ask(self, parts: Sequence[Buffer]) -> None:
        """Pass a question of the guest's on to the client whose cell asks it."""
        try:
            message = guest_messages.parse(parts, guest_messages.STDIN_CHECKS)
        except WireError as error:
            self._drop("guest stdin", str(error))
            return
        if message is None:
            return
        request = self._requests.pending(message.parent_id)
        if request is None or not request.allow_stdin:
            self._drop("guest stdin", "input_request that no running cell may make")
            return
        self._asking.append(request)
        self._clients.send("stdin", request, "input_request", message.content, guest_message=message)

    def answer(self, message: ClientMessage, connection: GuestConnection | None) -> None:
        """Pass a client's answer on to the guest."""
        # jupyter_client sends input_reply without a parent header: the client's identity says which question it
        # answers.
        asking = next((request for request in self._asking if request.identities == message.identities), None)
        if message.msg_type != "input_reply" or asking is None or connection is None:
            self._drop("client stdin", f"{message.msg_type!r} that was not asked for")
            return
        self._asking.remove(asking)
        with suppress(ConnectionClosed):
            connection.send(Channel.STDIN, message.parts)

    def over(self, request: Request) -> None:
        """Forget what a cell has asked: it has ended."""
        if self._asking:
            self._asking = [asking for asking in self._asking if asking is not request]

    def clear(self) -> None:
        """Forget all questions."""
        self._asking.clear()
