"""Makes the messages that go to clients, whoever's words they are: with a header and a signature of ours. Imports nothing heavy."""

from collections.abc import Sequence
from typing import Any

from agentvm_kernel.jupyter.guest_messages import GuestMessage
from agentvm_kernel.jupyter.requests import Request
from agentvm_kernel.jupyter.roles import Outlet
from agentvm_kernel.jupyter.wire import EMPTY, Buffer, Session


class ClientMessages:
    """Speaks to the clients.

    Args:
        session: signs.
        outlet: where messages go.
    """

    def __init__(self, session: Session, outlet: Outlet) -> None:
        self._session = session
        self._outlet = outlet

    def send(
        self,
        channel: str,
        request: Request,
        msg_type: str,
        content: dict[str, Any],
        *,
        guest_message: GuestMessage | None = None,
    ) -> None:
        """Send a message about a request to the client that made it, on shell, control or stdin."""
        self._outlet.send(channel, self._frames(msg_type, content, request, request.identities, guest_message))

    def publish(
        self,
        msg_type: str,
        content: dict[str, Any],
        request: Request | None,
        *,
        guest_message: GuestMessage | None = None,
    ) -> None:
        """Publish a message about a request to all clients; None is for one that nobody asked for."""
        topic = f"stream.{content['name']}" if msg_type == "stream" else f"kernel.{self._session.id}.{msg_type}"
        self._outlet.publish(self._frames(msg_type, content, request, (topic.encode(),), guest_message))

    def _frames(
        self,
        msg_type: str,
        content: dict[str, Any],
        request: Request | None,
        identities: Sequence[bytes],
        guest_message: GuestMessage | None,
    ) -> list[Buffer]:
        """Build a message; of the guest's own it takes metadata, date and buffers."""
        parent = EMPTY if request is None else request.header
        if guest_message is None:
            return self._session.serialize(self._session.header(msg_type), parent, {}, content, identities=identities)
        return self._session.serialize(
            self._session.header(msg_type, guest_message.date),
            parent,
            guest_message.metadata,
            content,
            identities=identities,
            buffers=guest_message.buffers,
        )
