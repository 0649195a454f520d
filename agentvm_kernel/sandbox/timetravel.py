"""Time travel: snapshots of a running machine, going back to one, running copies of it side by side.

A snapshot is taken at a clean boundary: the runtime confirms that no cell runs and that all output has left, then the machine stands still
for a moment. Going back means thawing the snapshot into a new machine; the caller moves its connection there and discards the old one. The
kernel process imports this module when it is first needed.
"""

import asyncio
import contextlib
import shutil
from collections.abc import Coroutine, Iterable

from agentvm_kernel.errors import AgentVMError, GuestError, HostError, MachineLost, SnapshotError
from agentvm_kernel.hypervisor import disk, garbage, memory
from agentvm_kernel.hypervisor import snapshot as files
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.freeze import freeze_live
from agentvm_kernel.hypervisor.machine import Machine
from agentvm_kernel.hypervisor.snapshot import Snapshot
from agentvm_kernel.log import get_logger
from agentvm_kernel.sandbox import snapshot_store
from agentvm_kernel.sandbox.identity import wake
from agentvm_kernel.sandbox.lease import Lease, from_snapshot
from agentvm_kernel.sandbox.settings import SandboxSettings
from agentvm_kernel.sandbox.spare import Spare

log = get_logger(__name__)

QUIESCE_S = 5.0
CHECKPOINTS = 20
"""So many automatic snapshots are kept, the newest."""
CHECKPOINT_BYTES = 2 << 30
"""All automatic snapshots of a session together may take so much disk; the newest is kept in any case."""
SPARE_DISK, CHECKPOINT_SPARE_DISK = 256 << 20, 1 << 30
"""So much disk must be free for a snapshot, and for an automatic one, in bytes."""
FORKS_AT_ONCE = 4
MAX_FORKS = 64


class TimeTravel:
    """The snapshots of one session and where its machine stands among them.

    Args:
        settings: the sandbox's settings; its libvirt is used where there is no machine to ask.
        session: names the history; a kernel that is restarted and uses the same finds its snapshots again.
    """

    def __init__(self, settings: SandboxSettings, session: str) -> None:
        self.session = session
        self._settings = settings
        self._here = ""
        self._untouched = False  # nothing was run since the machine was put where it is
        self._machine = ""  # name of the machine that these two are about
        self._hypervisor: Hypervisor | None = None
        self._lock = asyncio.Lock()
        self._spare = Spare()
        self._forked: list[Snapshot] = []  # what copies were made from
        self._drawing: asyncio.Future[None] | None = (
            None  # the machine's disk layers together; nothing else may use its disk
        )
        self._background: set[asyncio.Task[None]] = set()
        snapshot_store.adopt(session)

    @property
    def here(self) -> str:
        """Id of the snapshot that the machine was last at; empty at the beginning."""
        return self._here

    async def snapshot(self, lease: Lease, name: str, *, description: str = "", automatic: bool = False) -> Snapshot:
        """Freeze the machine into a snapshot. It runs on, and its connection stays.

        Args:
            lease: the machine.
            name: of the snapshot.
            description: shown in the list.
            automatic: made by agentvm itself; the oldest of these are deleted when there are many.

        Raises:
            SnapshotError: the name is taken or invalid, a cell is running, or it cannot be frozen. The machine runs on.
            HostError: the disk is too full.
            MachineLost: it is gone.
        """
        snapshot_store.require_name(name)
        async with self._lock:
            await asyncio.to_thread(snapshot_store.require_free, name, self.session)
            made = await self._freeze(lease, name, description, automatic)
            self._spare.prepare(lease.machine.hypervisor, made, reseed=False)
            return made

    async def checkpoint(self, lease: Lease) -> Snapshot | None:
        """Make the automatic snapshot before a cell; to be called before every cell while that is switched on.

        Returns:
            The snapshot; where nothing was run since the machine was put back to one, that one. None where it could not be made, which is
            logged and is no reason not to run the cell.
        """
        async with self._lock:
            if self._untouched and self._here and lease.machine.name == self._machine:
                at = await asyncio.to_thread(files.load, self._here)
                # `undo` goes back to automatic ones only.
                if at.automatic:
                    self._untouched = False
                    return at
            try:
                numbers = [
                    int(one.name[len("before-") :])
                    for one in await asyncio.to_thread(snapshot_store.visible, self.session)
                    if one.name.startswith("before-") and one.name[len("before-") :].isdecimal()
                ]
                made = await self._freeze(lease, f"before-{max(numbers, default=0) + 1}", "", True)
            except (AgentVMError, OSError) as error:
                log.warning("no_checkpoint", machine=lease.machine.name, error=str(error))
                return None
            self._untouched = False
            self._in_background(self._prune())
            return made

    def touched(self) -> None:
        """Note that something was run in the machine without a checkpoint before it."""
        self._untouched = False

    async def restore(self, name: str, current: Lease | None) -> Lease:
        """Return a machine that is where the snapshot was taken. The caller attaches it and then releases `current`.

        Args:
            name: of a snapshot of this session, or of an exported one.
            current: the machine in use, which is not touched; None where there is none or it is lost.

        Raises:
            SnapshotError: there is none of this name, or it does not fit this host. `current` goes on as it was.
            AgentVMError: the machine cannot be thawed.
        """
        async with self._lock:
            snapshot = await asyncio.to_thread(snapshot_store.find, name, self.session)
            return await self._thaw(snapshot, current)

    async def undo(self, steps: int, current: Lease | None) -> Lease:
        """Return a machine in the state before the last cell, or `steps` cells ago; see `restore`.

        Raises:
            SnapshotError: there are not so many automatic snapshots.
        """
        if steps < 1:
            raise SnapshotError("One step at least can be undone.")
        async with self._lock:
            everything = {one.id: one for one in await asyncio.to_thread(files.list_all)}
            path: list[Snapshot] = []
            at = everything.get(self._here)
            while at is not None and at not in path:
                if at.automatic and at.name and not (self._untouched and at.id == self._here):
                    path.append(at)
                at = everything.get(at.after)
            if len(path) < steps:
                raise SnapshotError(
                    f"Only {len(path)} cells can be undone." if path else "There is nothing to undo.",
                    hint="Automatic snapshots before each cell have to be switched on for that.",
                )
            return await self._thaw(path[steps - 1], current)

    async def fork(self, lease: Lease, count: int) -> list[Lease]:
        """Return machines that are copies of this one, each with an identity and random numbers of its own. This one goes on untouched.

        Args:
            lease: the machine to copy.
            count: how many copies.

        Raises:
            AgentVMError: not all of them could be made; none is left then.
        """
        if not 1 <= count <= MAX_FORKS:
            raise SnapshotError(f"{count} is no number of copies.", hint=f"It can be 1 to {MAX_FORKS}.")
        async with self._lock:
            self._forked = await asyncio.to_thread(_delete_unused, self._forked)
            untouched = self._untouched
            snapshot = await self._freeze(lease, "", "", True)
            self._forked.append(snapshot)
            self._here, self._untouched = snapshot.after, untouched
            hypervisor = lease.machine.hypervisor
            await asyncio.to_thread(memory.ensure_memory, hypervisor, snapshot)
        room = asyncio.Semaphore(FORKS_AT_ONCE)

        async def clone() -> Lease:
            async with room:
                return await from_snapshot(hypervisor, snapshot)

        tasks = [asyncio.ensure_future(clone()) for _ in range(count)]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(one.release() for one in results if isinstance(one, Lease)))
            raise

    async def delete(self, name: str) -> None:
        """Delete a snapshot; those that came after it stay whole.

        Raises:
            SnapshotError: there is none of this name.
        """
        async with self._lock:
            snapshot = await asyncio.to_thread(snapshot_store.find, name, self.session)
            self._spare.drop_for(snapshot)
            await asyncio.to_thread(garbage.remove, snapshot)

    async def export(self, name: str) -> Snapshot:
        """Keep a snapshot for good, for all notebooks.

        Raises:
            SnapshotError: there is none of this name, or an exported one has it already.
        """
        async with self._lock:
            snapshot = await asyncio.to_thread(snapshot_store.find, name, self.session)
            return await asyncio.to_thread(snapshot_store.export, snapshot)

    async def settled(self) -> None:
        """Wait until all that goes on in the background is done."""
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)

    def leave(self) -> None:
        """Give back what is only kept ready: this process ends. The snapshots stay for a kernel that is restarted."""
        self._spare.drop()

    async def end(self) -> None:
        """Delete all snapshots of the session that were not exported, once background work is done; its machines are given back."""
        self._spare.drop()
        await self.settled()
        async with self._lock:
            await asyncio.to_thread(snapshot_store.end_session, self.session)

    def names(self) -> list[str]:
        """Return the names of all snapshots that can be restored, oldest first."""
        return [one.name for one in snapshot_store.visible(self.session)]

    def as_text(self) -> str:
        """Return the tree of the snapshots as text, with a mark where the machine is."""
        return snapshot_store.as_text(snapshot_store.visible(self.session), self._here)

    def as_html(self) -> str:
        """Return the tree of the snapshots as HTML, with a mark where the machine is."""
        return snapshot_store.as_html(snapshot_store.visible(self.session), self._here)

    # ---- inside

    async def _freeze(self, lease: Lease, name: str, description: str, automatic: bool) -> Snapshot:
        """Bring the guest to a clean boundary, freeze it, set its clock right; `_here` moves to the snapshot."""
        machine = lease.machine
        if machine.name != self._machine:
            self._follow(machine)
        if self._drawing is not None:
            await asyncio.wait({self._drawing})
        _require_disk(CHECKPOINT_SPARE_DISK if automatic else SPARE_DISK)
        try:
            await lease.connection.call("quiesce", {"timeout_s": QUIESCE_S}, timeout_s=3 * QUIESCE_S)
        except GuestError as error:
            raise SnapshotError(f"Machine {machine.name} cannot be frozen now: {error.message}.") from error
        try:
            made = await asyncio.to_thread(
                freeze_live,
                machine,
                name=name,
                description=description,
                session=self.session,
                after=self._here,
                automatic=automatic,
            )
        except OSError as error:
            raise HostError(
                f"No snapshot of machine {machine.name} could be written: {error.strerror or error}.",
                hint="The machine runs on as before.",
            ) from error
        finally:
            if not lease.lost.done():
                await wake(lease.connection, machine)
        self._here, self._untouched = made.id, False
        self._in_background(asyncio.to_thread(_settle, made))
        self._drawing = self._in_background(asyncio.to_thread(_draw_together, machine))
        return made

    async def _thaw(self, snapshot: Snapshot, current: Lease | None) -> Lease:
        own = snapshot.session == self.session
        try:
            lease = await self._spare.take(snapshot)
            if lease is None:
                lease = await from_snapshot(self._libvirt(current), snapshot, reseed=not own)
            if current is not None:
                lease.idle = current.idle
        except OSError as error:
            raise MachineLost(
                f"Snapshot {snapshot.name} could not be thawed: {error.strerror or error}.",
                hint="The machine in use goes on as before.",
            ) from error
        self._follow(lease.machine)
        self._here, self._untouched = snapshot.id, True
        if not snapshot.automatic:
            self._spare.prepare(lease.machine.hypervisor, snapshot, reseed=not own)
        return lease

    def _follow(self, machine: Machine) -> None:
        """Note that the session goes on with another machine: one that we have put back, or one that replaces a lost one."""
        self._machine, self._untouched = machine.name, False
        with contextlib.suppress(SnapshotError):
            origin = files.load(machine.tags.template)
            self._here = "" if origin.is_template else origin.id

    def _libvirt(self, lease: Lease | None) -> Hypervisor:
        if lease is not None:
            return lease.machine.hypervisor
        if self._hypervisor is None:
            self._hypervisor = Hypervisor(self._settings.uri)
        return self._hypervisor

    async def _prune(self) -> None:
        """Delete the oldest automatic snapshots."""
        async with self._lock:
            automatic = [one for one in await asyncio.to_thread(snapshot_store.visible, self.session) if one.automatic]
            for one in _surplus(automatic):
                if one.id != self._here:
                    await asyncio.to_thread(garbage.remove, one)

    def _in_background(self, work: Coroutine[object, object, None]) -> "asyncio.Task[None]":
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background_ended)
        return task

    def _background_ended(self, task: "asyncio.Task[None]") -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("time_travel_background", error=f"{type(error).__name__}: {error}")


def _surplus(automatic: Iterable[Snapshot]) -> list[Snapshot]:
    """Return those that are too many or take too much."""
    total, surplus = 0, []
    for number, one in enumerate(sorted(automatic, key=lambda one: one.created, reverse=True)):
        total += one.size()
        if number >= CHECKPOINTS or (number and total > CHECKPOINT_BYTES):
            surplus.append(one)
    return surplus


def _require_disk(wanted: int) -> None:
    """Make sure that a snapshot does not fill the disk.

    Raises:
        HostError: too little is free.
    """
    folder = files.snapshots_dir()
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise HostError(
            f"Only {free >> 20} MiB of disk are free in {folder}; a snapshot needs {wanted >> 20} MiB.",
            hint="Delete snapshots that you do not need: agentvm snapshot list.",
        )


def _delete_unused(forked: list[Snapshot]) -> list[Snapshot]:
    """Delete those that no copy rests on any more, and return the others."""
    left = []
    for snapshot in forked:
        try:
            garbage.delete(snapshot)
        except (SnapshotError, OSError):
            left.append(snapshot)
    return left


def _draw_together(machine: Machine) -> None:
    try:
        disk.draw_together(machine)
    except AgentVMError as error:
        # Mostly because the machine has been given back meanwhile. The next snapshot tries again.
        log.debug("layers_not_drawn_together", machine=machine.name, error=str(error))


def _settle(snapshot: Snapshot) -> None:
    memory.settle(snapshot)
