"""Snapshots on disk: immutable machines to thaw others from, and the tree that they form.

    snapshots/ID/snapshot.json   what it is (see `Snapshot`)
    snapshots/ID/state           the devices' state, as QEMU saved it
    snapshots/ID/memory          the guest's memory; of a snapshot with a parent it can be rebuilt, from:
    snapshots/ID/delta           the pages that differ from the parent's memory (see `pages`)
    snapshots/ID/domain.xml      the machine's domain XML, without what belongs to one machine only
    snapshots/ID/secret          what its runtime and the host share until a thawed machine is given its own
    snapshots/ID/stamps.json     inode, size and times of the files above, to notice cheaply that one was changed
    layers/LAYER.qcow2           disk layers, each on top of its parent's; kept while anything needs them

A template is a snapshot without a parent: that of a cold boot. Standard library only: the kernel process imports this module.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from agentvm_kernel.errors import SnapshotError, SnapshotMismatchError
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import machines_dir, subfolder, write_atomically
from agentvm_kernel.hypervisor.pages import apply_delta, copy_sparse, data_segments
from agentvm_kernel.hypervisor.qcow2 import backing_file
from agentvm_kernel.hypervisor.states import Hardware
from agentvm_kernel.hypervisor.tags import Owner
from agentvm_kernel.log import get_logger
from agentvm_kernel.paths import state_dir

log = get_logger(__name__)

SNAPSHOT_ID = re.compile(r"[0-9a-f]{16}")
PARTIAL = ".partial-"
UNFINISHED_S = 600.0
READ_ONLY_SINCE = (8, 2, 0)
"""The first QEMU that maps a file privately without being able to write to it (readonly=on,rom=off)."""
DIGEST_BLOCK = 1 << 16


@dataclass(frozen=True)
class Snapshot:
    """A frozen machine.

    Attributes:
        id: 16 hexadecimal digits.
        name: what its maker called it; empty for a template.
        description: its maker's words.
        parent: id of the snapshot that its machine was thawed from; empty for a template.
        created: seconds since the epoch.
        hardware: of the machine.
        qemu: version of the QEMU that saved the state.
        machine_type: QEMU's versioned machine type.
        cpu: what CPU the guest saw (`Hypervisor.cpu_model`).
        layer: id of its disk layer.
        pages: pages in its delta; of a template, 0.
        pause_s: how long the machine stood still for it, in seconds.
        digests: SHA-256 by file name; of "memory" see `content_digest`.
        session: whose history it is part of (see `sandbox.snapshot_store`); empty for a template.
        after: id of the snapshot that came before it in that history; empty for the first.
        automatic: made by agentvm itself, as before a cell.
        exported: kept for good; others end with their session.
        owner_pid: process whose end is the session's; 0 for none.
        owner_start: its start time, as in `tags.Owner`.
        hostname: what the machine called itself; empty where that is not known.
    """

    id: str
    name: str
    description: str
    parent: str
    created: float
    hardware: Hardware
    qemu: str
    machine_type: str
    cpu: str
    layer: str
    pages: int
    pause_s: float
    digests: dict[str, str] = field(default_factory=dict)
    session: str = ""
    after: str = ""
    automatic: bool = False
    exported: bool = False
    owner_pid: int = 0
    owner_start: int = 0
    hostname: str = ""

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return snapshots_dir() / self.id

    @property
    def state(self) -> Path:
        """The devices' state."""
        return self.folder / "state"

    @property
    def memory(self) -> Path:
        """The guest's memory, where it has been built (see `materialise`)."""
        return self.folder / "memory"

    @property
    def delta(self) -> Path:
        """Its difference to the parent's memory; a template has none."""
        return self.folder / "delta"

    @property
    def domain_xml(self) -> Path:
        """The machine's domain XML."""
        return self.folder / "domain.xml"

    @property
    def secret(self) -> Path:
        """The secret that its runtime knows."""
        return self.folder / "secret"

    @property
    def disk(self) -> Path:
        """Its disk layer."""
        return layer_path(self.layer)

    @property
    def is_template(self) -> bool:
        """Whether it is a cold boot's."""
        return not self.parent

    @property
    def owner(self) -> Owner:
        """The process whose session it is of."""
        return Owner(self.owner_pid, self.owner_start)

    def size(self) -> int:
        """Return the bytes on disk that it needs of its own; a memory file that can be rebuilt does not count."""
        files = [self.state, self.disk, self.delta if self.delta.exists() else self.memory]
        return sum(path.stat().st_blocks * 512 for path in files if path.exists())

    def to_json(self) -> bytes:
        """Return what snapshot.json holds."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Snapshot":
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            values = json.loads(data)
            values["hardware"] = Hardware(**values["hardware"])
            # What earlier versions did not write has its default.
            snapshot = cls(**{entry.name: values[entry.name] for entry in fields(cls) if _required(entry, values)})
            ids = (snapshot.id, snapshot.layer, snapshot.parent or snapshot.id, snapshot.after or snapshot.id)
            if not all(SNAPSHOT_ID.fullmatch(text) for text in ids):
                raise ValueError("an id is malformed")
            for entry in fields(cls):
                if entry.type in (str, int, bool) and type(getattr(snapshot, entry.name)) is not entry.type:
                    raise ValueError(f"{entry.name} is of a wrong kind")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a snapshot's metadata: {error}") from error
        return snapshot


def _required(entry: "Field[Any]", values: dict[str, Any]) -> bool:
    return entry.name in values or (entry.default is MISSING and entry.default_factory is MISSING)


def snapshots_dir() -> Path:
    """Return the folder with one folder per snapshot."""
    return subfolder(state_dir() / "snapshots")


def layers_dir() -> Path:
    """Return the folder of disk layers."""
    return subfolder(state_dir() / "layers")


def layer_path(layer: str) -> Path:
    """Return the path of a disk layer."""
    return layers_dir() / f"{layer}.qcow2"


def new_id() -> str:
    """Return an id for a snapshot or a layer."""
    return secrets.token_hex(8)


def load(snapshot_id: str) -> Snapshot:
    """Return a snapshot.

    Raises:
        SnapshotError: there is none of this id, or its metadata are damaged.
    """
    if not SNAPSHOT_ID.fullmatch(snapshot_id):
        raise SnapshotError(f"{snapshot_id!r} is no id of a snapshot.", hint="`%snapshot --list` shows all.")
    try:
        return Snapshot.from_json((snapshots_dir() / snapshot_id / "snapshot.json").read_bytes())
    except FileNotFoundError:
        raise SnapshotError(f"There is no snapshot {snapshot_id}.", hint="`%snapshot --list` shows all.") from None
    except ValueError as error:
        raise SnapshotError(f"The metadata of snapshot {snapshot_id} are damaged: {error}.") from error


def list_all() -> list[Snapshot]:
    """Return all snapshots, oldest first; damaged ones are logged and left out."""
    found = []
    for folder in snapshots_dir().iterdir():
        if SNAPSHOT_ID.fullmatch(folder.name):
            try:
                found.append(load(folder.name))
            except SnapshotError as error:
                log.warning("snapshot_unreadable", snapshot=folder.name, error=str(error))
    return sorted(found, key=lambda snapshot: (snapshot.created, snapshot.id))


def find_template(
    hypervisor: Hypervisor, *, profile: str, accelerator: str, image: str, runtime: str, vsock: bool
) -> Snapshot | None:
    """Return the newest template that fits, None where one has to be made.

    Args:
        hypervisor: whose QEMU shall thaw it.
        profile: name of the resource profile.
        accelerator: "kvm" or "tcg".
        image: digest of the guest image.
        runtime: digest of the guest runtime.
        vsock: the machine has a vsock, otherwise a virtio-serial port.
    """
    wanted = (profile, accelerator, image, runtime, vsock)
    for snapshot in reversed(list_all()):
        hardware = snapshot.hardware
        has = (hardware.profile, hardware.accelerator, hardware.image, hardware.runtime, hardware.vsock)
        if snapshot.is_template and has == wanted and not differences(hypervisor, snapshot):
            return snapshot
    return None


def differences(hypervisor: Hypervisor, snapshot: Snapshot) -> list[str]:
    """Return in words what keeps `snapshot` from being thawed here; empty when nothing does."""
    found = []
    qemu = version_text(hypervisor.qemu_version)
    if qemu != snapshot.qemu:
        found.append(f"it was made by QEMU {snapshot.qemu}, here is {qemu}")
    cpu = hypervisor.cpu_model(snapshot.hardware.accelerator)
    if cpu != snapshot.cpu:
        found.append(f"its CPU was {snapshot.cpu}, here it is {cpu}")
    if not snapshot.disk.exists():
        found.append(f"its disk layer {snapshot.disk} is missing")
    return found


def require_thawable(hypervisor: Hypervisor, snapshot: Snapshot) -> None:
    """Make sure that `snapshot` can be thawed here.

    Raises:
        SnapshotMismatchError: it cannot; the message lists what differs. Nothing is lost.
    """
    if found := differences(hypervisor, snapshot):
        raise SnapshotMismatchError(
            f"Snapshot {snapshot.name or snapshot.id} cannot be thawed here: {'; '.join(found)}.",
            hint="It is kept as it is; use it on a host like the one that made it.",
        )


def version_text(version: tuple[int, int, int]) -> str:
    """Return a version with dots."""
    return ".".join(map(str, version))


def memory_mode(hypervisor: Hypervisor) -> int:
    """Return the mode of memory files. Older QEMUs insist on opening them for writing although they map them privately."""
    writable = hypervisor.qemu_version < READ_ONLY_SINCE
    if hypervisor.qemu_user[0] == os.geteuid():
        return 0o600 if writable else 0o400
    return 0o460 if writable else 0o440


def seal(hypervisor: Hypervisor, path: Path, mode: int) -> None:
    """Make a file ours and readable by QEMU: whoever breaks out into QEMU cannot change what other machines are thawed from.

    Args:
        hypervisor: whose QEMU it is.
        path: the file.
        mode: its mode; the group is QEMU's.
    """
    user = hypervisor.qemu_user
    if user[0] != os.geteuid():
        os.chown(path, os.geteuid(), user[1])
    path.chmod(mode)


def ensure_memory(hypervisor: Hypervisor, snapshot: Snapshot) -> Path:
    """Return the snapshot's memory file, built from its parents' where that has not been done, and sure to be unchanged.

    Raises:
        SnapshotMismatchError: the files are not what was frozen.
        SnapshotError: they are missing or damaged.
    """
    if _stamped(snapshot, ("memory", "state")):
        return snapshot.memory
    with _locked(snapshot.folder / "lock"):
        if _stamped(snapshot, ("memory", "state")):
            return snapshot.memory
        _check_digest(snapshot, "state")
        if "memory" in snapshot.digests and snapshot.memory.exists():
            _check_digest(snapshot, "memory")  # a template's, or copied here by a backup
        elif snapshot.is_template:
            raise SnapshotError(f"The memory of snapshot {snapshot.id} is missing.")
        else:
            _check_digest(snapshot, "delta")
            _build_memory(hypervisor, snapshot)
        seal(hypervisor, snapshot.memory, memory_mode(hypervisor))
        stamp(snapshot.folder)
    return snapshot.memory


def _build_memory(hypervisor: Hypervisor, snapshot: Snapshot) -> None:
    began = time.monotonic()
    parent = ensure_memory(hypervisor, load(snapshot.parent))
    partial = snapshot.folder / f".memory-{os.getpid()}"
    partial.unlink(missing_ok=True)
    copy_sparse(parent, partial)
    apply_delta(snapshot.delta, partial)
    partial.replace(snapshot.memory)
    log.debug("memory_built", snapshot=snapshot.id, seconds=round(time.monotonic() - began, 3))


def stamp(folder: Path) -> None:
    """Note what the files of a snapshot look like now."""
    stamps = {name: _stamp(folder / name) for name in ("memory", "state") if (folder / name).exists()}
    write_atomically(folder / "stamps.json", json.dumps(stamps).encode())


def _stamp(path: Path) -> list[int]:
    # The change time cannot be set by anybody, and each write moves it.
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_ctime_ns]


def _stamped(snapshot: Snapshot, names: Iterable[str]) -> bool:
    try:
        stamps = json.loads((snapshot.folder / "stamps.json").read_bytes())
        return all(stamps[name] == _stamp(snapshot.folder / name) for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_digest(snapshot: Snapshot, name: str) -> None:
    try:
        actual = content_digest(snapshot.folder / name)
    except FileNotFoundError:
        raise SnapshotError(f"Snapshot {snapshot.name or snapshot.id} has lost its file {name}.") from None
    if actual != snapshot.digests.get(name):
        raise SnapshotMismatchError(
            f"The file {snapshot.folder / name} is not the one that was frozen.",
            hint="Delete the snapshot, and find out who changed it.",
        )


def content_digest(path: Path) -> str:
    """Return a SHA-256 of a file that does not depend on which of its zeros are holes: of all blocks of 64 KiB that are not zero, each
    after its number, and of the size.
    """
    digest = hashlib.sha256()
    zero = bytes(DIGEST_BLOCK)
    with open(path, "rb", buffering=0) as file:
        size, done = os.fstat(file.fileno()).st_size, 0
        buffer = memoryview(bytearray(DIGEST_BLOCK))
        for start, end in data_segments(file.fileno()):
            for number in range(max(done, start // DIGEST_BLOCK), -(-end // DIGEST_BLOCK)):
                got = os.preadv(file.fileno(), [buffer], number * DIGEST_BLOCK)
                if buffer[:got] != zero[:got]:
                    digest.update(number.to_bytes(8, "little"))
                    digest.update(buffer[:got])
                done = number + 1
        digest.update(size.to_bytes(8, "little"))
    return digest.hexdigest()


@contextlib.contextmanager
def being_made(snapshot_id: str) -> Iterator[Path]:
    """Give a folder to put a snapshot's files into; it appears under its own name, whole, when the context ends without an error."""
    partial = snapshots_dir() / f"{PARTIAL}{snapshot_id}"
    partial.mkdir(mode=0o711)
    try:
        yield partial
        partial.rename(snapshots_dir() / snapshot_id)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def update(snapshot: Snapshot, **changes: Any) -> Snapshot:
    """Change metadata of a snapshot and return it as it is now.

    Raises:
        SnapshotError: it is gone.
    """
    with _locked(snapshots_dir() / ".lock"):
        new = replace(load(snapshot.id), **changes)
        write_atomically(new.folder / "snapshot.json", new.to_json())
    return new


def children(snapshot_id: str) -> list[Snapshot]:
    """Return the snapshots whose parent this is."""
    return [snapshot for snapshot in list_all() if snapshot.parent == snapshot_id]


def delete(hypervisor: Hypervisor, snapshot: Snapshot) -> None:
    """Delete a snapshot. Its children become its parent's; what they need of it is kept.

    Raises:
        SnapshotError: a machine that was thawed from it still exists.
    """
    if users := machines_of(snapshot):
        raise SnapshotError(
            f"Snapshot {snapshot.name or snapshot.id} is in use by {', '.join(users)}.",
            hint="Destroy that machine first.",
        )
    with _locked(snapshots_dir() / ".lock"):
        for child in children(snapshot.id):
            _detach(hypervisor, child, snapshot.parent)
        for later in list_all():
            if later.after == snapshot.id:
                write_atomically(later.folder / "snapshot.json", replace(later, after=snapshot.after).to_json())
        doomed = snapshots_dir() / f"{PARTIAL}deleted-{snapshot.id}"
        snapshot.folder.rename(doomed)
        shutil.rmtree(doomed)
    collect_garbage()


def _detach(hypervisor: Hypervisor, child: Snapshot, grandparent: str) -> None:
    """Make `child` independent of its parent's memory: from now on its own memory file is the original."""
    ensure_memory(hypervisor, child)
    digests = {"state": child.digests["state"], "memory": content_digest(child.memory)}
    new = replace(child, parent=grandparent, digests=digests, pages=0)
    write_atomically(child.folder / "snapshot.json", new.to_json())
    child.delta.unlink(missing_ok=True)


def collect_garbage() -> list[str]:
    """Delete disk layers that no snapshot and no machine rests on, and what was left of unfinished snapshots; return their names."""
    removed = []
    now = time.time()
    with _locked(snapshots_dir() / ".lock"):
        for partial in snapshots_dir().glob(f"{PARTIAL}*"):
            if now - partial.stat().st_mtime > UNFINISHED_S:
                shutil.rmtree(partial, ignore_errors=True)
                removed.append(partial.name)
        needed: set[Path] = set()
        tops = [snapshot.disk for snapshot in list_all()] + list(machines_dir().glob("*/*.qcow2"))
        for top in tops:
            layer: Path | None = top
            while layer is not None and layer not in needed and layer.exists():
                needed.add(layer)
                layer = backing_file(layer)
        for layer in layers_dir().iterdir():
            # A layer is linked here before the pause in which its machine moves on to the next.
            if layer not in needed and now - layer.stat().st_ctime > UNFINISHED_S:
                layer.unlink(missing_ok=True)
                removed.append(layer.name)
    return removed


def machines_of(snapshot: Snapshot) -> list[str]:
    """Return the names of the machines that were thawed from a snapshot and still exist."""
    return sorted(record["name"] for record in _machine_records() if record.get("template") == snapshot.id)


def _machine_records() -> Iterator[dict[str, Any]]:
    for path in machines_dir().glob("*/machine.json"):
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(path.read_bytes())
            if isinstance(record, dict) and isinstance(record.get("name"), str):
                yield record


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
