"""The memory of snapshots: where it is, that nobody changed it, and how a machine gets it.

A template has its memory in a file. Every other snapshot has a delta on top of its parent (see `pages`), so its memory is the file of the
nearest ancestor that has one, plus all deltas in between. A thawing machine maps that file and is given the deltas' pages before it runs;
where many machines are thawed from one snapshot, or where the kernel does not let us write to QEMU's memory, a file is built first.

Files are known by their digests, and cheaply by their stamps: inode, size and change time. The kernel process imports this module.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from agentvm_kernel.errors import SnapshotError, SnapshotMismatchError
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import write_atomically
from agentvm_kernel.hypervisor.pages import apply_deltas, copy_sparse, data_segments, merge
from agentvm_kernel.hypervisor.snapshot import Snapshot, load, locked, update
from agentvm_kernel.log import get_logger

log = get_logger(__name__)

READ_ONLY_SINCE = (8, 2, 0)
"""The first QEMU that maps a file privately without being able to write to it (readonly=on,rom=off)."""
DIGEST_BLOCK = 1 << 16
_FILES = ("memory", "delta", "state")


def sources(hypervisor: Hypervisor, snapshot: Snapshot) -> tuple[Snapshot, list[Snapshot]]:
    """Return the nearest snapshot with a memory file, and those whose deltas come on top of it, newest first; all sure to be unchanged.

    Raises:
        SnapshotMismatchError: a file is not what was frozen.
        SnapshotError: one is missing or damaged.
    """
    _verify(hypervisor, snapshot, ("state",))
    if snapshot.internal:  # its memory is in there, too
        return snapshot, []
    above: list[Snapshot] = []
    base = snapshot
    while not base.memory.exists():
        if not base.parent or base in above:
            raise SnapshotError(f"The memory of snapshot {base.name or base.id} is missing.")
        above.append(base)
        base = load(base.parent)
    for one in above:
        _verify(hypervisor, one, ("delta",))
    _verify(hypervisor, base, ("memory",))
    return base, above


def ensure_memory(hypervisor: Hypervisor, snapshot: Snapshot) -> Path:
    """Return the snapshot's memory file, built where that has not been done, and sure to be unchanged.

    Raises:
        SnapshotMismatchError: a file is not what was frozen.
        SnapshotError: one is missing or damaged.
    """
    with locked(snapshot.folder / "lock"):
        base, above = sources(hypervisor, snapshot)
        if above:
            began = time.monotonic()
            partial = snapshot.folder / f".memory-{os.getpid()}"
            partial.unlink(missing_ok=True)
            try:
                copy_sparse(base.memory, partial)
                apply_deltas([one.delta for one in above], partial)
                seal(hypervisor, partial, memory_mode(hypervisor))
                partial.replace(snapshot.memory)
            finally:
                partial.unlink(missing_ok=True)
            stamp(snapshot.folder)
            log.debug("memory_built", snapshot=snapshot.id, seconds=round(time.monotonic() - began, 3))
    return snapshot.memory


def absorb(child: Snapshot, parent: Snapshot) -> Snapshot:
    """Make `child` independent of its parent, which is about to be deleted, and return it as it is then.

    To be called under the lock of all snapshots.

    Raises:
        SnapshotError: one of them is damaged.
    """
    child = replace(child, digests=_all_digests(child))
    with locked(child.folder / "lock"):
        if parent.parent:
            partial = child.folder / f".delta-{os.getpid()}"
            partial.unlink(missing_ok=True)
            pages = merge(partial, [child.delta, parent.delta], child.memory_pages)
            digests = {"state": child.digests["state"], "delta": content_digest(partial)}
            partial.chmod(0o400)
            partial.replace(child.delta)
        else:
            # Its memory becomes the original. A file that is there may be mapped by machines, so it stays the same one.
            if not child.memory.exists():
                partial = child.folder / f".memory-{os.getpid()}"
                partial.unlink(missing_ok=True)
                copy_sparse(parent.memory, partial, mode=0o600)
                apply_deltas([child.delta], partial)
                status = parent.memory.stat()
                os.chown(partial, status.st_uid, status.st_gid)
                partial.chmod(status.st_mode & 0o777)
                partial.replace(child.memory)
            digests = {"state": child.digests["state"], "memory": content_digest(child.memory)}
            pages = 0
        new = replace(child, parent=parent.parent, digests=digests, pages=pages)
        write_atomically(new.folder / "snapshot.json", new.to_json())
        if not new.parent:
            child.delta.unlink()
        stamp(new.folder)
    return new


def settle(snapshot: Snapshot) -> Snapshot:
    """Add the digests that were left out when the machine was frozen, since nobody should wait for them; return the snapshot with them.

    Raises:
        SnapshotMismatchError: a file changed meanwhile.
    """
    digests = _all_digests(snapshot)
    return snapshot if digests == snapshot.digests else update(snapshot, digests=digests)


def _all_digests(snapshot: Snapshot) -> dict[str, str]:
    names = [name for name in ("state", "delta") if name not in snapshot.digests and (snapshot.folder / name).exists()]
    if names and not _stamped(snapshot, names):
        raise SnapshotMismatchError(
            f"Files of snapshot {snapshot.name or snapshot.id} changed before they were digested."
        )
    return snapshot.digests | {name: content_digest(snapshot.folder / name) for name in names}


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


def stamp(folder: Path) -> None:
    """Note what the files of a snapshot look like now."""
    stamps = {name: _stamp(folder / name) for name in _FILES if (folder / name).exists()}
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


def _verify(hypervisor: Hypervisor, snapshot: Snapshot, names: tuple[str, ...]) -> None:
    """Make sure that files are what was frozen; where the stamps do not say so (a backup was put back, say), the digests have to."""
    if _stamped(snapshot, names):
        return
    for name in names:
        _check_digest(snapshot, name)
        if name == "memory":
            seal(hypervisor, snapshot.memory, memory_mode(hypervisor))
    stamp_only = [name for name in _FILES if (snapshot.folder / name).exists()]
    if all(name in names or _stamped(snapshot, (name,)) for name in stamp_only):
        stamp(snapshot.folder)


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
