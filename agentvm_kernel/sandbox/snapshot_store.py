"""The snapshots as their users see them: by name, in one history per notebook, kept until its session ends unless exported.

Below is `hypervisor.snapshot`, which knows them by id and keeps their files. The kernel process imports this module.
"""

import asyncio
import html
import re
import time
from collections.abc import Iterable, Iterator

from agentvm_kernel.errors import SnapshotError
from agentvm_kernel.hypervisor import garbage, memory
from agentvm_kernel.hypervisor import snapshot as files
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.freeze import to_disk
from agentvm_kernel.hypervisor.snapshot import Snapshot
from agentvm_kernel.hypervisor.tags import Owner
from agentvm_kernel.log import get_logger
from agentvm_kernel.sandbox.lease import Lease, from_snapshot
from agentvm_kernel.sandbox.settings import SandboxSettings

log = get_logger(__name__)

START_FROM = "AGENTVM_FROM"
"""Environment variable that has a kernel start from a snapshot, given by its id or, where it was exported, by its name."""
NAME = re.compile(r"[^\W_][\w.+-]{0,62}")


def require_name(name: str) -> None:
    """Make sure that `name` is one for a snapshot.

    Raises:
        SnapshotError: it is not.
    """
    if not NAME.fullmatch(name):
        raise SnapshotError(
            f"{name[:80]!r} is no name for a snapshot.",
            hint="Use letters, digits, '.', '_', '+' and '-', at most 63, beginning with a letter or digit.",
        )


def visible(session: str) -> list[Snapshot]:
    """Return the named snapshots that a session can use, oldest first: its own, and what was exported."""
    return [one for one in files.list_all() if one.name and (one.exported or (session and one.session == session))]


def find(name: str, session: str = "") -> Snapshot:
    """Return the snapshot of this name.

    Args:
        name: of the snapshot, or its id.
        session: whose snapshots count beside the exported ones.

    Raises:
        SnapshotError: there is none; the hint names those that exist.
    """
    candidates = visible(session)
    for snapshot in reversed(candidates):
        if name in (snapshot.name, snapshot.id):
            return snapshot
    known = ", ".join(one.name for one in candidates if not one.automatic) or "none yet"
    raise SnapshotError(f"There is no snapshot {name[:80]!r}.", hint=f"Snapshots: {known}.")


def find_any(name: str) -> Snapshot:
    """Return the snapshot of this name, whichever session made it; for the command line.

    Args:
        name: of the snapshot, or its id.

    Raises:
        SnapshotError: there is none, or several sessions have one of this name.
    """
    snapshots = [one for one in files.list_all() if one.name]
    found = [one for one in snapshots if one.id == name] or [one for one in snapshots if one.name == name]
    if len(found) == 1:
        return found[0]
    if not found:
        raise SnapshotError(f"There is no snapshot {name[:80]!r}.", hint="`agentvm snapshot list` shows all.")
    ids = ", ".join(one.id for one in found)
    raise SnapshotError(f"Several notebooks have a snapshot {name!r}.", hint=f"Give an id: {ids}.")


def require_importable(name: str) -> None:
    """Make sure that an imported snapshot may have this name.

    Raises:
        SnapshotError: it is none for a snapshot, or an exported one has it.
    """
    require_name(name)
    if any(one.exported and one.name == name for one in files.list_all()):
        raise SnapshotError(
            f"An exported snapshot is called {name!r} already.", hint="Give this one another name: --name NAME."
        )


async def start_from(name: str, settings: SandboxSettings) -> Lease:
    """Lease a machine that goes on where a snapshot was taken, with an identity and random numbers of its own.

    Args:
        name: of an exported snapshot, or the id of any.
        settings: its libvirt is used.

    Raises:
        SnapshotError: there is none, or it does not fit this host; the message says what differs.
    """
    by_id = files.SNAPSHOT_ID.fullmatch(name) is not None
    snapshot = await asyncio.to_thread(files.load if by_id else find, name)
    return await from_snapshot(Hypervisor(settings.uri), snapshot)


def require_free(name: str, session: str) -> None:
    """Make sure that no snapshot which the session can see has this name.

    Raises:
        SnapshotError: one has.
    """
    for snapshot in visible(session):
        if snapshot.name == name:
            raise SnapshotError(
                f"There is a snapshot {name!r} already.", hint="Choose another name, or delete it first."
            )


def export(snapshot: Snapshot) -> Snapshot:
    """Keep a snapshot for good, for all notebooks of this user.

    Raises:
        SnapshotError: another exported one has its name.
    """
    for other in files.list_all():
        if other.exported and other.name == snapshot.name and other.id != snapshot.id:
            raise SnapshotError(
                f"An exported snapshot is called {snapshot.name!r} already.",
                hint=f"Delete that one first: agentvm snapshot delete {snapshot.name}.",
            )
    at: Snapshot | None = snapshot
    while at is not None and not at.is_template:
        settled = memory.settle(at)
        to_disk(settled, settled.folder)
        at = files.load(at.parent) if at.parent else None
    return files.update(snapshot, exported=True, automatic=False)


def adopt(session: str) -> None:
    """Make this process the owner of a session's snapshots: its kernel was restarted."""
    owner = Owner.current()
    for snapshot in files.list_all():
        if snapshot.session == session and snapshot.owner != owner:
            files.update(snapshot, owner_pid=owner.pid, owner_start=owner.start)
            (snapshot.folder / garbage.ORPHANED).unlink(missing_ok=True)


def end_session(session: str) -> None:
    """Delete a session's snapshots, but the exported ones."""
    for snapshot in reversed(files.list_all()):
        if snapshot.session == session and not snapshot.exported:
            garbage.remove(snapshot)


# ---- the tree


def tree(snapshots: Iterable[Snapshot]) -> Iterator[tuple[str, Snapshot]]:
    """Yield the snapshots in the order of their history, each after the lines that lead to it in a drawing."""
    shown = {snapshot.id: snapshot for snapshot in snapshots}
    everything = {snapshot.id: snapshot for snapshot in files.list_all()}

    def origin(snapshot: Snapshot) -> str:
        """The nearest shown snapshot before this one."""
        before, seen = snapshot.after, {snapshot.id}
        while before and before not in shown and before in everything and before not in seen:
            seen.add(before)
            before = everything[before].after
        return before if before in shown else ""

    later: dict[str, list[Snapshot]] = {}
    for snapshot in shown.values():
        later.setdefault(origin(snapshot), []).append(snapshot)

    # A stack and no recursion: a history may be longer than Python's.
    stack = [("", "", snapshot) for snapshot in reversed(later.get("", []))]
    while stack:
        lead, branch, snapshot = stack.pop()
        yield lead + branch, snapshot
        below = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        following = later.get(snapshot.id, [])
        if len(following) == 1 and not branch and not lead:
            # A history without branches is a plain list.
            stack.append(("", "", following[0]))
            continue
        for number, child in enumerate(reversed(following)):
            stack.append((below, "├─ " if number else "└─ ", child))


def as_text(snapshots: Iterable[Snapshot], here: str) -> str:
    """Return the tree as text.

    Args:
        snapshots: what to show.
        here: id of the snapshot that the machine was last at.
    """
    rows = [(f"{lines}{one.name}", *_columns(one), one.id == here) for lines, one in tree(snapshots)]
    if not rows:
        return "There are no snapshots yet."
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        f"{'*' if at else ' '} {name:<{width}}  {when}  {size:>8}  {text}".rstrip()
        for name, when, size, text, at in rows
    )


def as_html(snapshots: Iterable[Snapshot], here: str) -> str:
    """Return the tree as a table; see `as_text`."""
    rows = []
    for lines, one in tree(snapshots):
        when, size, text = map(html.escape, _columns(one))
        name = html.escape(one.name)
        at = one.id == here
        label = f"<b>{name}</b> ◀ here" if at else name
        rows.append(
            f'<tr><td style="text-align:left"><code>{lines}</code>{label}</td><td>{when}</td><td>{size}</td>'
            f'<td style="text-align:left">{text}</td></tr>'
        )
    if not rows:
        return "<i>There are no snapshots yet.</i>"
    head = "<tr><th>Snapshot</th><th>Time</th><th>Size</th><th>Description</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _columns(snapshot: Snapshot) -> tuple[str, str, str]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.created))
    notes = [snapshot.description] if snapshot.description else []
    notes += ["(automatic)"] if snapshot.automatic else []
    notes += ["(exported)"] if snapshot.exported else []
    return when, f"{snapshot.size() / 1024**2:.1f} MiB", " ".join(notes)
