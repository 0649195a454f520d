"""Makes the guest's output wait while clients do not take it, so that a flood fills neither this process nor the host's memory.

ZeroMQ bounds what it keeps for a slow subscriber by messages, a thousand, whatever their size. This counts bytes, and stops
the guest's credit on iopub above LIMIT; the guest's kernel then waits in its print(). Imports nothing heavy.
"""

import time
from collections.abc import Callable
from functools import partial

from agentvm_kernel.transport.connection import GuestConnection
from guest_runtime.wire import Channel

LIMIT = 64 * 1024 * 1024
STALL_S = 20.0
_INTERVAL_S = 0.02


class OutputValve:
    """Watches what waits for iopub subscribers.

    Args:
        backlog: tells how many bytes wait for subscribers.
        call_later: calls something after so many seconds.
    """

    def __init__(self, backlog: Callable[[], int], call_later: Callable[[float, Callable[[], None]], None]) -> None:
        self._backlog = backlog
        self._call_later = call_later
        self._closed_for: GuestConnection | None = None
        self._lowest = 0
        self._progress_at = 0.0
        # Held by subscribers that took nothing for STALL_S: the others are not made to wait for them any longer.
        self._given_up = 0

    def check(self, connection: GuestConnection) -> None:
        """Close the valve where too much waits; call this after publishing what came from a guest."""
        if self._closed_for is connection:
            return
        backlog = self._backlog()
        self._given_up = min(self._given_up, backlog)
        if backlog - self._given_up > LIMIT:
            connection.pause(Channel.IOPUB)
            self._closed_for = connection
            self._lowest, self._progress_at = backlog, time.monotonic()
            self._call_later(_INTERVAL_S, partial(self._look_again, connection))

    def _look_again(self, connection: GuestConnection) -> None:
        if self._closed_for is not connection:
            return
        backlog, now = self._backlog(), time.monotonic()
        if backlog < self._lowest:
            self._lowest, self._progress_at = backlog, now
        if now - self._progress_at > STALL_S:
            self._given_up = backlog
        if backlog - self._given_up > LIMIT // 2:
            self._call_later(_INTERVAL_S, partial(self._look_again, connection))
            return
        self._closed_for = None
        connection.resume(Channel.IOPUB)
