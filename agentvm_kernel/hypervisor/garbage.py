"""Deletes snapshots, and collects what nothing rests on any more: disk layers, unfinished snapshots, those of sessions that ended.

The kernel process imports this module only with time travel.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentvm_kernel.errors import SnapshotError
from agentvm_kernel.hypervisor.files import machines_dir, write_atomically
from agentvm_kernel.hypervisor.memory import absorb
from agentvm_kernel.hypervisor.qcow2 import backing_file
from agentvm_kernel.hypervisor.snapshot import PARTIAL, Snapshot, layers_dir, list_all, locked, snapshots_dir, update
from agentvm_kernel.log import get_logger

log = get_logger(__name__)

ORPHANED = "orphaned"
"""File in a snapshot's folder that tells since when its session's process has been gone."""
UNFINISHED_S = 600.0
"""What is being made is finished by then, or will never be; in seconds."""
RESTART_S = 600.0
"""A kernel that is restarted finds the snapshots of its session again for so long, in seconds."""


def delete(snapshot: Snapshot) -> None:
    """Delete a snapshot. Its children become its parent's; what they need of it is kept.

    Raises:
        SnapshotError: a machine that was thawed from it still exists.
    """
    with locked(snapshots_dir() / ".lock"):
        if users := machines_of(snapshot):
            raise SnapshotError(
                f"Snapshot {snapshot.name or snapshot.id} is in use by {', '.join(users)}.",
                hint="Destroy that machine first.",
            )
        for other in list_all():
            if other.parent == snapshot.id:
                other = absorb(other, snapshot)
            if other.after == snapshot.id:
                write_atomically(other.folder / "snapshot.json", replace(other, after=snapshot.after).to_json())
        doomed = snapshots_dir() / f"{PARTIAL}deleted-{snapshot.id}"
        snapshot.folder.rename(doomed)
        shutil.rmtree(doomed)
    collect_garbage()


def remove(snapshot: Snapshot) -> None:
    """Delete a snapshot; one that a machine still rests on is no longer shown, and goes when that machine has gone."""
    try:
        delete(snapshot)
    except SnapshotError:
        if not machines_of(snapshot):
            raise
        update(snapshot, name="", exported=False, automatic=True)


def collect() -> list[str]:
    """Delete snapshots that nobody can reach: nameless ones that nothing rests on, and those of sessions that ended but were not exported.

    Returns:
        Ids of snapshots and names of files that were deleted.
    """
    removed = []
    for snapshot in reversed(list_all()):
        if snapshot.is_template or snapshot.exported or (snapshot.name and not _given_up(snapshot)):
            continue
        if time.time() - snapshot.created < UNFINISHED_S and snapshot.owner.alive():
            continue  # it may be about to be thawed
        if not machines_of(snapshot):
            try:
                delete(snapshot)
                removed.append(snapshot.id)
            except (SnapshotError, OSError) as error:
                log.warning("snapshot_not_collected", snapshot=snapshot.id, error=str(error))
    return removed + collect_garbage()


def _given_up(snapshot: Snapshot) -> bool:
    """Whether its session's process has been gone for so long that no restarted kernel will come back to it."""
    mark = snapshot.folder / ORPHANED
    if snapshot.owner.alive():
        mark.unlink(missing_ok=True)
        return False
    try:
        return time.time() - mark.stat().st_mtime > RESTART_S
    except FileNotFoundError:
        mark.touch(mode=0o600)
        return False


def collect_garbage() -> list[str]:
    """Delete disk layers that no snapshot and no machine rests on, and what was left of unfinished snapshots; return their names."""
    removed = []
    now = time.time()
    with locked(snapshots_dir() / ".lock"):
        for partial in snapshots_dir().glob(f"{PARTIAL}*"):
            if now - partial.stat().st_mtime > UNFINISHED_S:
                shutil.rmtree(partial, ignore_errors=True)
                removed.append(partial.name)
        needed: set[Path] = set()
        tops = [snapshot.disk for snapshot in list_all()] + list(machines_dir().glob("*/*.qcow2"))
        for top in tops:
            layer: Path | None = top
            # An overlay may just be being made, or be gone; what it will rest on is some snapshot's.
            with contextlib.suppress(SnapshotError, OSError):
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
    """Return the names of the machines that were thawed from a snapshot, or map its memory, and still exist."""
    return sorted(
        record["name"] for record in _machine_records() if snapshot.id in (record.get("template"), record.get("memory"))
    )


def _machine_records() -> Iterator[dict[str, Any]]:
    for path in machines_dir().glob("*/machine.json"):
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(path.read_bytes())
            if isinstance(record, dict) and isinstance(record.get("name"), str):
                yield record
