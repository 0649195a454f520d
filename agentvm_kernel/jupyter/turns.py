"""Whose turn it is: the order among requests, where some are run by the host.

Requests of the main shell are served in the order in which they came. Those for the guest are passed on at once and wait there, except
that nothing passes a cell with host magics: it begins when everything before it is done, and what comes after it waits here until it
has ended. Requests on the control channel and on subshells go past it. Nothing goes anywhere while there is no machine, or while it is
frozen or replaced. Imports nothing heavy.
"""

from collections import deque
from collections.abc import Callable

from agentvm_kernel.jupyter.requests import Request, RequestTable
from agentvm_kernel.jupyter.wire import Buffer

Forward = Callable[[Request, list[Buffer]], None]


class Turns:
    """The requests that wait on the host.

    Args:
        requests: the table that all requests are in.
        forward: passes one on to the guest.
        begin: begins a cell that the host runs; `end` or `release` has to follow.

    Attributes:
        has_machine: there is a guest to forward to.
        standstill: nothing may reach the guest now.
        host_cell: the cell that the host runs now.
    """

    def __init__(self, requests: RequestTable, forward: Forward, begin: Callable[[Request], None]) -> None:
        self.has_machine = False
        self.standstill = False
        self.host_cell: Request | None = None
        self._requests = requests
        self._forward = forward
        self._begin = begin
        self._held: deque[tuple[Request, list[Buffer]]] = deque()
        self._began: list[Buffer] = []
        self._pumping = False

    def __len__(self) -> int:
        return len(self._held)

    def first_cell(self) -> Request | None:
        """Return the first cell that waits and shows what it does."""
        return next((request for request, _ in self._held if request.is_cell and not request.silent), None)

    def add(self, request: Request, parts: list[Buffer]) -> None:
        """Queue a request, and see whether it may go on at once."""
        self._held.append((request, parts))
        self.pump()

    def pump(self) -> None:
        """Let go what may go."""
        if self._pumping:
            return
        self._pumping = True
        try:
            waiting, self._held = self._held, deque()
            blocked = self.host_cell is not None
            while waiting:
                request, parts = waiting.popleft()
                if not self.has_machine or self.standstill or (blocked and request.in_turn):
                    self._held.append((request, parts))
                elif request.plan is None:
                    self._forward(request, parts)
                elif self._requests.main_shell_busy():
                    blocked = True
                    self._held.append((request, parts))
                else:
                    blocked = True
                    self.host_cell, self._began = request, parts
                    self._begin(request)
        finally:
            self._held.extend(waiting)
            self._pumping = False

    def release(self) -> None:
        """Pass the present cell on to the guest, just as it came, after all."""
        request, self.host_cell = self.host_cell, None
        if request is not None:
            request.plan = None
            self._held.appendleft((request, self._began))
        self.pump()

    def end(self) -> None:
        """The present cell has ended."""
        self.host_cell = None
        self._began = []
        self.pump()

    def take_cells(self) -> list[Request]:
        """Take out all cells that wait, to be answered by the caller."""
        taken = [request for request, _ in self._held if request.is_cell]
        self._held = deque(item for item in self._held if not item[0].is_cell)
        return taken

    def clear(self) -> None:
        """Forget everything that waits."""
        self._held.clear()
