"""Snapshots on disk: immutable machines to thaw others from, and the tree that they form.

    snapshots/ID/snapshot.json   what it is (see `Snapshot`)
    snapshots/ID/state           the devices' state, as QEMU saved it
    snapshots/ID/memory          the guest's memory; a snapshot with a parent has it where it was needed, built from:
    snapshots/ID/delta           the pages that differ from the parent's memory (see `memory` and `pages`)
    snapshots/ID/domain.xml      the machine's domain XML, without what belongs to one machine only
    snapshots/ID/secret          what its runtime and the host share until a thawed machine is given its own
    snapshots/ID/stamps.json     inode, size and times of the files above, to notice cheaply that one was changed
    layers/LAYER.qcow2           disk layers, each on top of its parent's; kept while anything needs them

A template is the snapshot of a cold boot; it has no parent. Standard library only: the kernel process imports this module.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from agentvm_kernel.errors import SnapshotError, SnapshotMismatchError
from agentvm_kernel.hypervisor import accelerator
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import subfolder, write_atomically
from agentvm_kernel.hypervisor.qcow2 import backing_file
from agentvm_kernel.hypervisor.states import Hardware
from agentvm_kernel.hypervisor.tags import Owner
from agentvm_kernel.log import get_logger
from agentvm_kernel.paths import state_dir

log = get_logger(__name__)

SNAPSHOT_ID = re.compile(r"[0-9a-f]{16}")
PARTIAL = ".partial-"


@dataclass(frozen=True)
class Snapshot:
    """A frozen machine.

    Attributes:
        id: 16 hexadecimal digits.
        name: what its maker called it; empty for a template.
        description: its maker's words.
        parent: id of the snapshot that its delta is based on; empty for one that has all of its memory in a file.
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
        internal: state and memory lie inside the disk layer (see `internal`); "state" is another name of that layer then.
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
    internal: bool = False

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
        """The guest's memory, where it has a file of its own (see `memory`)."""
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
        return not (self.parent or self.owner_pid or self.name)

    @property
    def memory_pages(self) -> int:
        """Pages of 4 KiB that the guest's memory has."""
        return self.hardware.memory_mib << 8

    @property
    def owner(self) -> Owner:
        """The process whose session it is of."""
        return Owner(self.owner_pid, self.owner_start)

    def size(self) -> int:
        """Return the bytes on disk that it needs of its own; a memory file that can be rebuilt does not count."""
        files = [
            self.disk,
            self.delta if self.delta.exists() else self.memory,
            *([] if self.internal else [self.state]),
        ]
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
                value = getattr(snapshot, entry.name)
                if (
                    type(value) is not entry.type
                    and not (entry.type is float and type(value) is int)
                    and entry.name != "digests"
                ):
                    raise ValueError(f"{entry.name} is of a wrong kind")
            if not all(type(text) is str for pair in snapshot.digests.items() for text in pair):
                raise ValueError("digests are of a wrong kind")
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
    return os.urandom(8).hex()


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


def differences(hypervisor: Hypervisor, snapshot: Snapshot) -> list[str]:
    """Return in words what keeps `snapshot` from being thawed here; empty when nothing does."""
    from agentvm_kernel.hypervisor import mechanism
    from agentvm_kernel.image.runtime import runtime_digest

    found = []
    qemu = version_text(hypervisor.qemu_version)
    if qemu != snapshot.qemu:
        found.append(f"it was made by QEMU {snapshot.qemu}, here is {qemu}")
    cpu = hypervisor.cpu_model(snapshot.hardware.accelerator)
    if cpu != snapshot.cpu:
        found.append(f"its CPU was {snapshot.cpu}, here it is {cpu}")
    if (here := accelerator.choose().kind) != snapshot.hardware.accelerator:
        found.append(f"it ran under {snapshot.hardware.accelerator}, here machines run under {here}")
    if runtime_digest() != snapshot.hardware.runtime:
        found.append("it has another version of agentvm's guest runtime in it")
    if not snapshot.internal and (way := mechanism.known(hypervisor)) is not None and way.kind == "internal":
        found.append(f"it needs pass-through to QEMU, and machines are thawed otherwise here: {way.reason}")
    layer: Path | None = snapshot.disk
    while layer is not None:
        if not layer.exists():
            what = "disk layer" if layer.parent == layers_dir() else "guest image"
            found.append(f"its {what} {layer} is missing")
            break
        layer = backing_file(layer)
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
    with locked(snapshots_dir() / ".lock"):
        new = replace(load(snapshot.id), **changes)
        write_atomically(new.folder / "snapshot.json", new.to_json())
    return new


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes while the context lasts."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
