"""A notebook's machine and its history, as the host magics see them."""

import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

from agentvm_kernel.errors import MachineError
from agentvm_kernel.jupyter.backend import Backend
from agentvm_kernel.jupyter.backend import Lease as AnyLease
from agentvm_kernel.jupyter.proxy import Proxy
from agentvm_kernel.log import get_logger
from agentvm_kernel.sandbox.settings import CellLimits, SandboxSettings, load_settings

if TYPE_CHECKING:
    from agentvm_kernel.sandbox.lease import Lease
    from agentvm_kernel.sandbox.timetravel import TimeTravel

log = get_logger(__name__)


class Owner(Protocol):
    """Whoever has the machine; `kernel_app.KernelApp` is one."""

    @property
    def lease(self) -> AnyLease | None:
        """The machine in use."""

    def use(self, lease: AnyLease) -> None:
        """Go on with another machine, and give the present one back."""

    def pause(self) -> None:
        """Pause the machine as soon as no request is being answered."""


class Notebook:
    """What the magics of one notebook share.

    Args:
        owner: has the machine.
        proxy: passes cells on.
        backend: where fresh machines come from.
        session: names this notebook's history.

    Attributes:
        checkpoint_costs: what the last ones cost, in seconds.
    """

    def __init__(self, owner: Owner, proxy: Proxy, backend: Backend, session: str) -> None:
        self.checkpoint_costs: deque[float] = deque(maxlen=100)
        self._owner = owner
        self._proxy = proxy
        self._backend = backend
        self._session = session
        self._settings: SandboxSettings | None = None
        self._travel: TimeTravel | None = None

    @property
    def checkpoints(self) -> bool:
        """Whether an automatic snapshot is made before each cell."""
        return self._proxy.plans_all

    @checkpoints.setter
    def checkpoints(self, wanted: bool) -> None:
        if wanted and not self._proxy.plans_all:
            self.touched()  # by all cells so far
        self._proxy.plans_all = wanted

    @property
    def limits(self) -> CellLimits:
        """What a cell may use up."""
        return self._proxy.guard.limits

    @limits.setter
    def limits(self, limits: CellLimits) -> None:
        self._proxy.guard.limits = limits

    @property
    def settings(self) -> SandboxSettings:
        """The settings of this notebook's machine. Raises ConfigError."""
        if self._settings is None:
            self._settings = load_settings()
        return self._settings

    @property
    def lease(self) -> "Lease":
        """The machine in use.

        Raises:
            MachineError: there is none, or what runs the cells is no machine.
        """
        from agentvm_kernel.sandbox.lease import Lease

        lease = self._owner.lease
        if lease is None:
            raise MachineError("There is no machine at present.", hint="The next cell gets a fresh one.")
        if not isinstance(lease, Lease):
            raise MachineError(
                f"There is no machine: cells run in {lease.description}.",
                hint="Unset AGENTVM_LOCAL_RUNTIME to work in a machine.",
            )
        return lease

    @property
    def lease_if_any(self) -> "Lease | None":
        """The machine in use, None where it is lost. Raises MachineError where what runs the cells is no machine."""
        return None if self._owner.lease is None else self.lease

    @property
    def travel(self) -> "TimeTravel":
        """The snapshots of this notebook. Raises AgentVMError."""
        if self._travel is None:
            from agentvm_kernel.sandbox.timetravel import TimeTravel

            self._travel = TimeTravel(self.settings, self._session)
        return self._travel

    def use(self, lease: AnyLease) -> None:
        """Go on with another machine; the present one is given back."""
        from agentvm_kernel.sandbox.lease import Lease

        if isinstance(lease, Lease):
            lease.idle = self.settings.idle
        self._owner.use(lease)

    def pause(self) -> None:
        """Pause the machine when this cell has ended. Raises MachineError where what runs the cells is no machine."""
        if self.lease is not None:
            self._owner.pause()

    async def fresh(self) -> AnyLease:
        """Return another machine, as at the start of the notebook. Raises AgentVMError."""
        return await self._backend.acquire(lambda text: None)

    def leave(self) -> None:
        """This process ends."""
        if self._travel is not None:
            self._travel.leave()

    def touched(self) -> None:
        """Note that something was run in the machine without an automatic snapshot before it."""
        if self._travel is not None:
            self._travel.touched()

    async def checkpoint(self) -> bool:
        """Make the automatic snapshot before a cell; return whether there is one. Raises AgentVMError."""
        began = time.monotonic()
        if await self.travel.checkpoint(self.lease) is None:
            return False
        self.checkpoint_costs.append(time.monotonic() - began)
        return True
