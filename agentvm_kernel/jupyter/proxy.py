"""Forwards Jupyter messages between clients and the guest's ipykernel, and answers what the host can answer itself.

Client to guest: signatures are checked, the request goes into the table, its parts travel on without identities and
signature. Guest to client: every message is parsed, checked against the table and its type's shape, and rebuilt with
the host's own header, the parent header from the table and a signature. Whatever does not fit is dropped and counted.
Requests that come while there is no machine wait and are forwarded in order. Purely synchronous; called by the event
loop only.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from agentvm_kernel.errors import AgentVMError, ConnectionClosed, MachineError, MachineLost
from agentvm_kernel.jupyter import guest_messages
from agentvm_kernel.jupyter.cell_guard import CellGuard
from agentvm_kernel.jupyter.client_messages import ClientMessages
from agentvm_kernel.jupyter.guest_messages import GuestMessage
from agentvm_kernel.jupyter.kernel_info import kernel_info
from agentvm_kernel.jupyter.magics.names import mentions
from agentvm_kernel.jupyter.output_valve import OutputValve
from agentvm_kernel.jupyter.questions import Questions
from agentvm_kernel.jupyter.requests import FORWARDED, Progress, Request, RequestTable, read_request
from agentvm_kernel.jupyter.roles import Outlet, Owner
from agentvm_kernel.jupyter.turns import Turns
from agentvm_kernel.jupyter.wire import EMPTY, Buffer, ClientMessage, Session, WireError, pack_json
from agentvm_kernel.log import get_logger
from agentvm_kernel.transport.connection import GuestConnection
from guest_runtime.wire import Channel

log = get_logger(__name__)

ASSISTED = frozenset({"complete_request", "inspect_request"})
LAST_OUTPUT_S = 10.0
KERNEL_INFO_PATIENCE_S = 1.0
BEGIN_PATIENCE_S = 1.0
GUEST_CHANNELS = {"shell": Channel.SHELL, "control": Channel.CONTROL}


class Proxy:
    """The state of all conversations between the clients and one guest after another.

    Attributes:
        dropped: how many messages were dropped, by reason.
        plans_all: ask for a plan for every cell, not only for those that mention a host magic.
        guard: limits what cells use up.
        next_count: what the guest's next cell will be counted as.
    """

    def __init__(self, session: Session, outlet: Outlet, owner: Owner) -> None:
        self.dropped: Counter[str] = Counter()
        self.plans_all = False
        self.next_count = 1
        self.guard = CellGuard(owner.call_later, lambda: owner.interrupt(lambda _: None), owner.end_python, self._tell)
        self._session = session
        self._outlet = outlet
        clients = ClientMessages(session, outlet)
        self._send, self._publish = clients.send, clients.publish
        self._owner = owner
        self._requests = RequestTable()
        self._connection: GuestConnection | None = None
        self._valve = OutputValve(outlet.backlog, owner.call_later)
        self._turns = Turns(self._requests, self._forward, owner.run_cell)
        self._notice = ""
        self._used_at = time.monotonic()
        self._said_starting = False
        self._unanswered_info: list[Request] = []
        self._shown: tuple[Request, str] | None = None
        self._questions = Questions(self._requests, clients, self._drop)
        self._awaited: list[Callable[[], object]] = []
        self._on_host: dict[str, Callable[[ClientMessage, Request], None]] = {
            "kernel_info_request": self._kernel_info,
            "connect_request": self._connect,
            "interrupt_request": self._interrupt,
            "shutdown_request": self._shutdown,
        }

    # ---- the machine comes and goes

    def attach(self, connection: GuestConnection) -> None:
        """Forward to this guest from now on, first of all what was held."""
        self._connection = connection
        connection.on_message[Channel.IOPUB] = self._on_guest_iopub
        connection.on_message[Channel.SHELL] = lambda parts: self._on_guest_reply("shell", parts)
        connection.on_message[Channel.CONTROL] = lambda parts: self._on_guest_reply("control", parts)
        connection.on_message[Channel.STDIN] = self._questions.ask
        if self._shown is not None:
            self._publish("clear_output", {"wait": False}, self._shown[0])
            self._shown = None
        self._turns.has_machine = True
        self._turns.pump()

    def switch(self, connection: GuestConnection) -> None:
        """Forward to another guest from now on, which takes the place of this one without anything being lost."""
        if self._connection is not None:
            self._connection.on_message.clear()
        for request in self._requests.elsewhere():
            self._fail(request, MachineError("The machine was put back to another state before it answered this."))
        self._notice = ""  # whatever was lost before, this one is where the user wants it
        self.attach(connection)

    def detach(self, error: AgentVMError, *, notice: str = "") -> None:
        """There is no guest (any more): answer whatever is unanswered with `error`.

        Args:
            error: what happened and what to do, for people.
            notice: shown on the standard error of the next cell that runs.
        """
        if self._connection is not None:
            self._connection.on_message.clear()
            self._connection = None
        self._notice = notice
        self._turns.has_machine = False
        self._turns.clear()
        self._shown = None
        self._questions.clear()
        unfinished = self._requests.clear()
        for request in unfinished:
            self.guard.ended(request)
        for request in unfinished:
            # The cell that the host runs is answered by whoever runs it.
            if not request.is_part and request is not self._turns.host_cell:
                self._fail(request, error)
        for request in unfinished:
            if request.on_done is not None:
                request.on_done(error)
        self.next_count = 1

    def idle_since(self) -> float | None:
        """Return when the last request ended, on the monotonic clock; None while one is being answered."""
        # Of an answered cell the last outputs and `idle` may still be on their way.
        settling = self._requests.has_unfinished() and time.monotonic() - self._used_at < LAST_OUTPUT_S
        busy = len(self._turns) or settling or any(map(self._requests.has_pending, GUEST_CHANNELS))
        return None if busy else self._used_at

    def park(self) -> bool:
        """Hold requests from now on, as while there is no machine; False, and nothing is held, while one is being answered."""
        if self._connection is None or self.idle_since() is None:
            return False
        self._connection = None
        self._turns.has_machine = False
        return True

    def show_progress(self, text: str) -> None:
        """Tell the first cell that waits for a machine what it is waiting for; removed again when the cell starts."""
        request = self._turns.first_cell()
        if request is not None and self._shown != (request, text):
            self._shown = (request, text)
            if request.plan is None and request.code is not None:
                self.show_input(request)  # clients expect it before any output
                request.input_shown = True
            self._tell(request, text)

    def tell_running(self, text: str) -> None:
        """Write a line to the standard error of every cell that is running."""
        for request in self._requests.running():
            self._tell(request, text)

    def _tell(self, request: Request, text: str) -> None:
        self._publish("stream", {"name": "stderr", "text": f"{text}\n"}, request)

    # ---- from clients

    def on_client_message(self, channel: str, frames: list[bytes]) -> None:
        """Take one message from the shell, control or stdin socket."""
        try:
            message = self._session.deserialize(frames)
            if channel == "stdin":
                self._questions.answer(message, self._connection)
            else:
                self._client_request(channel, message)
        except WireError as error:
            self._drop(f"client {channel}", str(error))

    def on_subscribe(self, topic: bytes) -> None:
        """Welcome a client that subscribed to iopub (JEP 65); the first one also learns that the kernel starts."""
        content = {"subscription": topic.decode("utf-8", "replace")}
        frames = self._session.serialize(self._session.header("iopub_welcome"), EMPTY, {}, content)
        self._outlet.publish([topic, *frames] if topic else frames)
        if not self._said_starting:
            self._said_starting = True
            self._publish("status", {"execution_state": "starting"}, None)

    def _client_request(self, channel: str, message: ClientMessage) -> None:
        request = read_request(channel, message)
        if (answer := self._on_host.get(request.msg_type)) is not None:
            self._set_status(request, Progress.BUSY)
            answer(message, request)
            return
        if request.msg_type not in FORWARDED[channel]:
            self._drop(f"client {channel}", f"unknown message type {request.msg_type!r}")
            self._set_status(request, Progress.BUSY)
            self._set_status(request, Progress.IDLE)
            return
        if request.msg_type in ASSISTED:
            content = message.content()
            if mentions(str(content.get("code", ""))) and (reply := self._owner.assist(request.msg_type, content)):
                self._set_status(request, Progress.BUSY)
                self._answer(request, reply)
                return
        if (
            request.is_cell
            and request.in_turn
            and (mentions(request.code or "") or (self.plans_all and request.stored))
        ):
            request.plan = self._owner.plan_cell(request.code or "")
        self._used_at = time.monotonic()
        self._requests.add(request)
        if self._connection is None and not len(self._turns):
            self._set_status(request, Progress.BUSY)
        self._turns.add(request, message.parts)
        if self._connection is None:
            self._owner.machine_wanted()

    def _forward(self, request: Request, parts: list[Buffer]) -> None:
        connection = self._connection
        if connection is None:
            return
        request.in_guest = True
        if self._notice and request.is_cell and not request.silent:
            self._set_status(request, Progress.BUSY)
            self._tell(request, self._notice)
            self._notice = ""
        try:
            connection.send(GUEST_CHANNELS[request.channel], parts)
        except ConnectionClosed:
            # The owner is about to hear of it and detaches, which answers this request with the rest.
            return
        except ValueError as error:
            self._fail(request, WireError(f"The request cannot be passed to the machine: {error}."))

    # ---- cells that the host runs

    def show_input(self, cell: Request) -> None:
        """Say that a cell has begun."""
        self._set_status(cell, Progress.BUSY)
        if not cell.silent:
            self.publish(cell, "execute_input", {"code": cell.code, "execution_count": self.next_count})
        cell.code = None

    def publish(self, cell: Request, msg_type: str, content: dict[str, Any]) -> None:
        """Publish something of the host's own about a cell."""
        self._set_status(cell, Progress.BUSY)
        self._publish(msg_type, content, cell)

    def run_part(
        self,
        cell: Request,
        content: dict[str, Any],
        metadata: dict[str, Any],
        on_done: Callable[[GuestMessage | AgentVMError], None],
    ) -> None:
        """Have the guest run something as a part of a cell; its output becomes the cell's.

        Args:
            cell: which cell; it is the host's turn for it.
            content: of the execute_request.
            metadata: likewise.
            on_done: called with the reply after all output, or with what kept the guest from answering.
        """
        if self._connection is None:
            on_done(MachineLost("There is no machine to run this in.", hint="The next cell gets a fresh one."))
            return
        header = self._session.header("execute_request")
        fresh: dict[str, Any] = {"code": None, "plan": None, "in_turn": True, "progress": Progress.QUEUED}
        part = replace(cell, msg_id=header["msg_id"], is_part=True, on_done=on_done, **fresh)
        self._requests.add(part)
        self._forward(part, [pack_json(header), EMPTY, pack_json(metadata), pack_json(content)])

    def release_cell(self) -> None:
        """Leave the present cell to the guest, as it came; to the next one, where that has gone."""
        if (cell := self._turns.host_cell) is not None:
            self._requests.add(cell)
        self._turns.release()
        if self._connection is None:
            self._owner.machine_wanted()

    def end_cell(self, cell: Request, content: dict[str, Any], of_guest: GuestMessage | None) -> None:
        """Answer the present cell; what waited behind it goes on, or is aborted with it.

        Args:
            cell: which.
            content: of the reply.
            of_guest: the guest's reply to its last part, whose metadata and time hold for the cell.
        """
        aborted = self._taken_along(cell, content)
        self._reply(cell, "execute_reply", content, guest_message=of_guest)
        self._abort(aborted)
        self._set_status(cell, Progress.IDLE)
        self._turns.end()
        if self._connection is None and len(self._turns):
            self._owner.machine_wanted()

    def stand_still(self, still: bool) -> None:
        """Keep everything but the present cell's own parts from the guest, or let it through again."""
        self._turns.standstill = still
        if not still:
            self._turns.pump()

    def others_in_guest(self) -> bool:
        """Whether the guest works on something besides the main shell."""
        return bool(self._requests.elsewhere())

    def _taken_along(self, cell: Request, reply: dict[str, Any]) -> list[Request]:
        """Return the waiting cells that a cell with this reply takes along with it."""
        stops = reply["status"] == "error" and cell.stop_on_error and cell.in_turn and not cell.silent
        return self._turns.take_cells() if stops and not cell.is_part else []

    def _abort(self, cells: list[Request]) -> None:
        for cell in cells:
            self._answer(cell, {"status": "aborted"})

    def _part_done(self, part: Request) -> None:
        if part.reply is not None and part.progress is Progress.IDLE and part.on_done is not None:
            on_done, part.on_done = part.on_done, None
            on_done(part.reply)

    # ---- answered by the host

    def _kernel_info(self, message: ClientMessage, request: Request) -> None:
        self._unanswered_info.append(request)
        if self._connection is not None and self._requests.has_pending(request.channel):
            # In its turn, like every reply of a channel, unless that takes longer than JupyterLab would wait.
            self._owner.call_later(KERNEL_INFO_PATIENCE_S, self._answer_kernel_info)
        else:
            self._answer_kernel_info()

    def _answer_kernel_info(self) -> None:
        waiting, self._unanswered_info = self._unanswered_info, []
        ready = self._connection.ready if self._connection is not None else {}
        for request in waiting:
            self._answer(request, kernel_info(str(ready.get("python", "")), str(ready.get("ipython", ""))))

    def _connect(self, message: ClientMessage, request: Request) -> None:
        self._answer(request, {"status": "ok", **self._outlet.info.ports()})

    def _interrupt(self, message: ClientMessage, request: Request) -> None:
        self.interrupt_held()
        self._owner.interrupt(lambda content: self._answer(request, content))

    def interrupt_held(self) -> None:
        """End cells that wait for a machine: the first as interrupted, the others aborted, like ipykernel's queue."""
        if self._turns.host_cell is not None:
            self._owner.interrupt_cell()
        if self._connection is not None:
            # What waits behind a cell is aborted when that one fails.
            return
        for number, request in enumerate(self._turns.take_cells()):
            if number == 0:
                self._fail(request, AgentVMError("The cell was interrupted before it ran."), ename="KeyboardInterrupt")
            else:
                self._answer(request, {"status": "aborted"})

    def when_cell_runs(self, then: Callable[[], object]) -> None:
        """Call something once the guest runs the cell whose turn it is, or soon after: a cell takes no interrupt before it runs."""
        cell = self._requests.next_cell()
        if cell is None or cell.begun:
            then()
            return
        self._awaited.append(then)
        self._owner.call_later(BEGIN_PATIENCE_S, self._begun)

    def _begun(self, cell: Request | None = None) -> None:
        if cell is not None:
            cell.begun = True
        awaited, self._awaited = self._awaited, []
        for then in awaited:
            then()

    def _shutdown(self, message: ClientMessage, request: Request) -> None:
        content = {"status": "ok", "restart": message.content().get("restart") is True}
        self._answer(request, content)
        self._publish("shutdown_reply", content, request)
        self._owner.shutdown()

    def _answer(self, request: Request, content: dict[str, Any]) -> None:
        if request.reply_type is not None:
            self._reply(request, request.reply_type, content)
        self._set_status(request, Progress.IDLE)

    def _fail(self, request: Request, error: AgentVMError, *, ename: str = "") -> None:
        """Answer a request that the guest will not answer."""
        ename = ename or type(error).__name__
        content: dict[str, Any] = {"ename": ename, "evalue": str(error), "traceback": []}
        self._set_status(request, Progress.BUSY)
        if request.is_cell:
            content["traceback"] = [f"\x1b[0;31m{ename}\x1b[0m: {error}"]
            if not request.silent:
                self._publish("error", content, request)
            content["execution_count"] = self.next_count
        self._answer(request, {"status": "error", **content})

    # ---- from the guest

    def _on_guest_iopub(self, parts: list[bytes]) -> None:
        try:
            message = guest_messages.parse(parts, guest_messages.IOPUB_CHECKS)
        except WireError as error:
            self._drop("guest iopub", str(error))
            return
        if message is None:
            return
        request = self._requests.known(message.parent_id)
        if request is None:
            self._drop("guest iopub", f"{message.msg_type} of an unknown request")
            return
        if message.msg_type == "status":
            self._set_status(request, Progress.BUSY if message.content["execution_state"] == "busy" else Progress.IDLE)
            if request.silent:
                self._begun(request)
            return
        if message.msg_type == "execute_input":
            self._begun(request)
            if request.is_part or request.input_shown:
                return
            if request.code is None:
                self._drop("guest iopub", "execute_input that is not due")
                return
            message.content["code"], request.code = request.code, None
        if message.msg_type == "error":
            self.guard.amend(request, message)
        shown, word = self.guard.admits(request, message, sum(map(len, parts[3:])))
        if shown:
            self._publish(message.msg_type, message.content, request, guest_message=message)
        if word:
            self._tell(request, word)
        if self._connection is not None:
            self._valve.check(self._connection)

    def _on_guest_reply(self, channel: str, parts: list[bytes]) -> None:
        try:
            message = guest_messages.parse(parts, guest_messages.REPLY_CHECKS)
        except WireError as error:
            self._drop(f"guest {channel}", str(error))
            return
        if message is None:
            return
        request = self._requests.pending(message.parent_id)
        if request is None or request.channel != channel or request.reply_type != message.msg_type:
            self._drop(f"guest {channel}", f"{message.msg_type} that nobody waits for")
            return
        aborted: list[Request] = []
        if request.is_cell:
            self._cell_replied(request, message)
            aborted = self._taken_along(request, message.content)
            if request.is_part:
                request.reply = message
                self._requests.answered(request)
                self._questions.over(request)
                self._part_done(request)
                return
        self._reply(request, message.msg_type, message.content, guest_message=message)
        self._abort(aborted)

    def _cell_replied(self, request: Request, message: GuestMessage) -> None:
        self.guard.amend(request, message)
        self.guard.ended(request)
        count = message.content.get("execution_count")
        if request.in_turn and count is not None and message.content["status"] != "aborted":
            self.next_count = count + 1

    # ---- to clients

    def _set_status(self, request: Request, progress: Progress) -> None:
        """Publish busy and idle of a request once each and in this order, whoever says so first."""
        if progress != request.progress + 1:
            return
        request.progress = progress
        if request.is_cell and request.in_guest:
            (self.guard.began if progress is Progress.BUSY else self.guard.finished)(request)
        if request.is_part:
            self._part_done(request)
            return
        self._publish("status", {"execution_state": "busy" if progress is Progress.BUSY else "idle"}, request)

    def _reply(
        self, request: Request, msg_type: str, content: dict[str, Any], *, guest_message: GuestMessage | None = None
    ) -> None:
        self._used_at = time.monotonic()
        self._requests.answered(request)
        self._questions.over(request)
        self._send(request.channel, request, msg_type, content, guest_message=guest_message)
        if self._unanswered_info and not self._requests.has_pending(request.channel):
            self._answer_kernel_info()
        if request.in_turn and len(self._turns):
            self._turns.pump()

    def _drop(self, where: str, why: str) -> None:
        self.dropped[where] += 1
        count = self.dropped[where]
        if count & (count - 1) == 0:
            # The 1st, 2nd, 4th, 8th…: a hostile guest must not fill the log.
            log.warning("message dropped", where=where, why=why, count=count)
