"""The keeper: fills the pool, replaces what is old or broken in it, and has orphaned machines removed.

One process at a time is the keeper, the one that holds the lock: `agentvm pool run`, or a process that a kernel started. When it dies, the
next kernel that looks starts another; the ready machines just stay. A pool that cannot be filled is tried again ever more rarely.
"""

import asyncio
import fcntl
import json
import os
import shutil
import signal
import time
from pathlib import Path

from agentvm_kernel import paths
from agentvm_kernel.errors import AgentVMError, HostError, UnknownMachineError
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import READY, MachineFiles, write_atomically
from agentvm_kernel.hypervisor.machine import Machine
from agentvm_kernel.hypervisor.profiles import get_profile
from agentvm_kernel.hypervisor.reap import qemu_alive, reap, remove_machine
from agentvm_kernel.hypervisor.snapshot import Snapshot
from agentvm_kernel.hypervisor.thaw import thaw
from agentvm_kernel.image import store
from agentvm_kernel.log import get_logger
from agentvm_kernel.sandbox import pool, templates
from agentvm_kernel.sandbox.identity import connect_thawed

log = get_logger(__name__)

LOOK_S = 0.5
"""How often the number of ready machines is looked at; that is one folder listing."""
CALM_S = 1.5
"""A claimed machine's first cell has the CPUs to itself for this long."""
HEALTH_S = 30.0
LINGER_S = 600.0
"""A keeper that nobody started by hand ends after this long without any machine in use."""
FIRST_RETRY_S, LAST_RETRY_S = 2.0, 120.0
SPARE_MEMORY = 0.25
"""Share of a machine's memory that must be available before another one is thawed; most of it is shared."""
SPARE_DISK = 1 << 30
BOOT_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 60.0


class Keeper:
    """The keeper of this process.

    Args:
        linger_s: end after so many seconds in which there was nothing to keep; None never does.
    """

    def __init__(self, *, linger_s: float | None) -> None:
        self._linger_s = linger_s
        self._stop = asyncio.Event()
        self._error = ""
        self._retry_s = FIRST_RETRY_S
        self._hypervisor: Hypervisor | None = None

    async def run(self) -> bool:
        """Keep the pool until a signal comes, the pool is empty on purpose, or nobody needs it; False when another process keeps it."""
        with pool.keeper_lock().open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            loop = asyncio.get_running_loop()
            for signum in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(signum, self._stop.set)
            self._note()
            try:
                await self._keep()
            finally:
                (paths.state_dir() / "keeper.json").unlink(missing_ok=True)
                if self._hypervisor is not None:
                    await asyncio.to_thread(self._hypervisor.close)
        return True

    async def _keep(self) -> None:
        next_try = next_health = 0.0
        last_ready, calm_since = -1, time.monotonic()
        needed = time.monotonic()
        while not self._stop.is_set():
            now = time.monotonic()
            config = pool.load_config()
            ready = len(pool.ready_machines())
            if ready < last_ready:
                calm_since = now
            last_ready = ready
            if pool.count_machines() > ready:
                needed = now
            if config.minimum == 0 and ready == 0:
                return
            if self._linger_s is not None and now - needed > self._linger_s:
                return
            if now >= next_health:
                await self._check(config)
                next_health = now + HEALTH_S
            if ready > config.minimum:
                await self._shrink(ready - config.minimum)
            elif ready < config.minimum and now >= next_try and now - calm_since >= CALM_S and pool.has_room():
                if await self._grow(config):
                    self._retry_s = FIRST_RETRY_S
                    continue
                next_try = time.monotonic() + self._retry_s
                self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._stop.wait()
            except TimeoutError:
                continue

    async def _connect(self, uri: str | None) -> Hypervisor:
        if self._hypervisor is None:
            self._hypervisor = await asyncio.to_thread(Hypervisor, uri)
        return self._hypervisor

    async def _grow(self, config: pool.PoolConfig) -> bool:
        """Put one more machine into the pool; False when that failed, with the reason noted for `agentvm pool status`."""
        try:
            hypervisor = await self._connect(config.uri)
            image = store.find(config.image)
            _require_space(config.profile)
            key = pool.key(image, config.profile, hypervisor.uri)

            async def prepared(template: Snapshot) -> Machine:
                return await prepare(hypervisor, template, key)

            await templates.use(hypervisor, image, config.profile, prepared, timeout_s=BOOT_TIMEOUT_S)
        except (AgentVMError, OSError) as error:
            self._note(str(error))
            log.warning("pool_not_filled", error=str(error))
            return False
        self._note()
        return True

    async def _shrink(self, surplus: int) -> None:
        for marker in pool.ready_machines()[:surplus]:
            await self._discard(marker)

    async def _check(self, config: pool.PoolConfig) -> None:
        """Replace machines that are broken, too old or no longer what is wanted; then remove what killed processes left."""
        try:
            hypervisor = await self._connect(config.uri)
            wanted = pool.key(store.find(config.image), config.profile, hypervisor.uri)
            for marker in pool.ready_machines():
                right = marker.name == f"{READY}{wanted}"
                if not right or not await asyncio.to_thread(qemu_alive, MachineFiles.of(marker.parent.name)):
                    await self._discard(marker)
            for marker in list(pool.expired(config.ttl_s, time.time())):
                await self._discard(marker)
            await asyncio.to_thread(reap, hypervisor)
        except AgentVMError as error:
            self._note(str(error))
            log.warning("pool_check_failed", error=str(error))

    async def _discard(self, marker: Path) -> None:
        if pool.claim_marker(marker):
            hypervisor = await self._connect(pool.load_config().uri)
            await asyncio.to_thread(remove_machine, hypervisor, marker.parent.name)

    def _note(self, error: str = "") -> None:
        write_atomically(paths.state_dir() / "keeper.json", json.dumps({"pid": os.getpid(), "error": error}).encode())


async def prepare(hypervisor: Hypervisor, template: Snapshot, key: str) -> Machine:
    """Thaw a machine, give it an identity, let it warm up, pause it and put it into the pool.

    What a thawed QEMU does for the first time is slow (pages are fetched, under emulation code is translated); it does it here.
    """
    machine = await asyncio.to_thread(thaw, hypervisor, template, state="preparing")
    try:
        await asyncio.to_thread(machine.resume)
        connection = await connect_thawed(machine, reseed=True, timeout_s=ANSWER_TIMEOUT_S)
        try:
            await connection.call("kernel.warm_up", timeout_s=ANSWER_TIMEOUT_S)
            await connection.call("quiesce", timeout_s=ANSWER_TIMEOUT_S)
        finally:
            await connection.close()
        await asyncio.to_thread(machine.pause)
        await asyncio.to_thread(machine.update_tags, state="pooled")
        pool.offer(machine.files.folder, key)
    except BaseException:
        await asyncio.to_thread(machine.destroy)
        raise
    machine.hypervisor.unlisten(machine.uuid)
    return machine


async def drain() -> int:
    """Take all ready machines out of the pool, remove them and return how many there were. The pool's size becomes 0."""
    config = pool.configure(minimum=0, maximum=0)
    hypervisor = await asyncio.to_thread(Hypervisor, config.uri)
    count = 0
    try:
        for marker in pool.ready_machines():
            if pool.claim_marker(marker):
                await asyncio.to_thread(remove_machine, hypervisor, marker.parent.name)
                count += 1
    except UnknownMachineError as error:
        log.warning("pool_drain", error=str(error))
    finally:
        await asyncio.to_thread(hypervisor.close)
    return count


def _require_space(profile: str) -> None:
    """Make sure that one more machine does not bring the host down.

    Raises:
        HostError: memory or disk is short.
    """
    wanted = get_profile(profile).memory_mib * 1024 * 1024 * SPARE_MEMORY
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:") and int(line.split()[1]) * 1024 < wanted:
            raise HostError(
                f"The pool cannot grow: only {int(line.split()[1]) // 1024} MiB of memory are available.",
                hint="Make the pool smaller (agentvm pool resize N) or choose a smaller profile.",
            )
    free = shutil.disk_usage(paths.state_dir()).free
    if free < SPARE_DISK:
        raise HostError(
            f"The pool cannot grow: only {free >> 20} MiB of disk are free in {paths.state_dir()}.",
            hint="Free some space, or set AGENTVM_STATE_DIR to a larger disk.",
        )


def main() -> int:
    """Run as a keeper that a kernel started."""
    asyncio.run(Keeper(linger_s=LINGER_S).run())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
