"""Gets hold of a machine while the kernel process is still importing the rest of itself.

Of a start, the longest part is QEMU's, and it needs no CPU of this process; so it is begun before asyncio, ZeroMQ and all that speaks
Jupyter are imported. What goes wrong here is only logged: `lease.acquire` then goes the usual way, runs into the same and explains it.
Imports little.
"""

import os
import sys
import threading

from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.machine import Machine, spawn_releaser
from agentvm_kernel.hypervisor.states import MachineState
from agentvm_kernel.hypervisor.thaw import thaw
from agentvm_kernel.image import store
from agentvm_kernel.log import get_logger
from agentvm_kernel.sandbox import pool, template_store
from agentvm_kernel.sandbox.settings import load_settings

log = get_logger(__name__)

SWITCH_S = 0.0005
"""How long the importing thread may keep the other one waiting; Python's default is ten times that."""


class HeadStart:
    """One machine, claimed from the pool or thawed by a thread. Use `take` or `drop`, once."""

    def __init__(self) -> None:
        self._machine: Machine | None = None
        self._pooled = False
        self._interval = sys.getswitchinterval()
        self._thread = threading.Thread(target=self._run, name="agentvm-head-start", daemon=True)
        sys.setswitchinterval(SWITCH_S)
        self._thread.start()

    def take(self) -> tuple[Machine, bool] | None:
        """Wait for the machine and return it, and whether it is from the pool; None where there is none. Blocks."""
        self._thread.join()
        sys.setswitchinterval(self._interval)
        machine, self._machine = self._machine, None
        return (machine, self._pooled) if machine is not None else None

    def drop(self) -> None:
        """Give the machine back: nobody will use it."""
        if (taken := self.take()) is not None:
            taken[0].release()

    def _run(self) -> None:
        try:
            self._machine = self._get()
        except Exception as error:
            log.info("no_head_start", error=f"{type(error).__name__}: {error}")

    def _get(self) -> Machine | None:
        settings = load_settings()
        hypervisor = Hypervisor(settings.uri)
        image = store.find(settings.image)
        name = pool.claim(pool.key(image, settings.profile, hypervisor.uri))
        if name is not None:
            self._pooled = True
            try:
                machine = Machine.attach(hypervisor, name)
                if machine.state is not MachineState.RUNNING:
                    machine.resume()
            except BaseException:
                spawn_releaser(name, hypervisor.uri)
                raise
            return machine
        if not pool.has_room():
            return None
        template = template_store.find_sound(hypervisor, image, settings.profile)
        return thaw(hypervisor, template) if template is not None else None


def begin() -> HeadStart | None:
    """Begin, unless this kernel needs another kind of machine."""
    if os.environ.get("AGENTVM_FROM") or os.environ.get("AGENTVM_LOCAL_RUNTIME") == "1":
        return None
    return HeadStart()
