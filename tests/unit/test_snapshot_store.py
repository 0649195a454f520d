"""Snapshots by name, and the tree that people see."""

import time

import pytest

from agentvm_kernel.errors import SnapshotError
from agentvm_kernel.hypervisor import snapshot as files
from agentvm_kernel.hypervisor.snapshot import Snapshot
from agentvm_kernel.hypervisor.states import Hardware
from agentvm_kernel.sandbox import snapshot_store, timetravel

HARDWARE = Hardware(
    profile="light", vcpus=1, memory_mib=64, disk_gib=1, cpu_quota_percent=100, accelerator="tcg", image="i",
    runtime="r", vsock=False,
)  # fmt: skip


@pytest.fixture
def make(tmp_path, monkeypatch):
    """`make(name, after=…)` adds a snapshot without its large files."""
    monkeypatch.setenv("AGENTVM_STATE_DIR", str(tmp_path))
    made: list[Snapshot] = []

    def add(
        name: str, *, after: Snapshot | None = None, session: str = "s", size: int = 0, **fields: object
    ) -> Snapshot:
        snapshot = Snapshot(
            **{
                "id": f"{len(made):016x}", "name": name, "description": "", "parent": "f" * 16,
                "created": 1000.0 + len(made), "hardware": HARDWARE, "qemu": "7.2.0", "machine_type": "q35", "cpu": "max",
                "layer": "e" * 16, "pages": 0, "pause_s": 0.1, "session": session,
                "after": after.id if after else "", **fields,
            }
        )  # fmt: skip
        snapshot.folder.mkdir()
        (snapshot.folder / "snapshot.json").write_bytes(snapshot.to_json())
        snapshot.delta.write_bytes(bytes(size))
        made.append(snapshot)
        return snapshot

    return add


def shapes(snapshots: list[Snapshot]) -> list[str]:
    return [lines + one.name for lines, one in snapshot_store.tree(snapshots)]


def test_a_history_without_branches_is_a_list_and_branches_are_drawn(make):
    a = make("a")
    b = make("b", after=a)
    assert shapes(files.list_all()) == ["a", "b"]
    c = make("c", after=b)
    make("d", after=b)
    make("e", after=c)
    make("f", after=c)
    make("other")
    assert shapes(files.list_all()) == ["a", "b", "├─ c", "│  ├─ e", "│  └─ f", "└─ d", "other"]


def test_what_is_not_shown_does_not_break_the_lines(make):
    a = make("a")
    hidden = make("", after=a)
    b = make("b", after=hidden)
    lost = make("lost", after=b)
    make("c", after=lost)
    (lost.folder / "snapshot.json").unlink()
    shown = [one for one in files.list_all() if one.name]
    assert shapes(shown) == ["a", "b", "c"]


def test_a_circle_in_damaged_metadata_ends(make):
    a = make("a", after=None)
    files.update(a, after=a.id)
    b = make("b")
    c = make("c", after=b)
    files.update(b, after=c.id)
    snapshot_store.as_text(files.list_all(), here="")


def test_a_very_long_history_is_shown(make):
    before = None
    for number in range(300):
        before = make(f"n{number}", after=before)
    assert len(snapshot_store.as_text(files.list_all(), here="").splitlines()) == 300


def test_text_and_html_say_where_we_are_and_quote_what_users_wrote(make):
    a = make("a", description="<script>alert(1)</script>")
    make("b", after=a, automatic=True)
    make("c", after=a, exported=True)
    text = snapshot_store.as_text(files.list_all(), here=a.id)
    assert [line[0] for line in text.splitlines()] == ["*", " ", " "]
    assert "(automatic)" in text
    assert "(exported)" in text
    page = snapshot_store.as_html(files.list_all(), here=a.id)
    assert "<script>" not in page
    assert page.count("here") == 1
    assert snapshot_store.as_text([], here="") == "There are no snapshots yet."
    assert "There are no snapshots yet" in snapshot_store.as_html([], here="")


def test_names_are_looked_up_in_the_session_and_among_the_exported(make):
    make("mine")
    foreign = make("foreign", session="t")
    shared = make("shared", session="t", exported=True)
    assert [one.name for one in snapshot_store.visible("s")] == ["mine", "shared"]
    assert snapshot_store.find("shared", "s").id == snapshot_store.find(shared.id).id == shared.id
    with pytest.raises(SnapshotError, match=r"no snapshot 'foreign'. Snapshots: mine, shared"):
        snapshot_store.find("foreign", "s")
    with pytest.raises(SnapshotError, match="already"):
        snapshot_store.require_free("shared", "s")
    snapshot_store.require_free("foreign", "s")
    assert snapshot_store.find_any("foreign").id == foreign.id
    make("mine", session="t")
    with pytest.raises(SnapshotError, match=r"Several notebooks.*Give an id"):
        snapshot_store.find_any("mine")
    with pytest.raises(SnapshotError, match="no snapshot 'none'"):
        snapshot_store.find_any("none")
    with pytest.raises(SnapshotError, match="already"):
        snapshot_store.require_importable("shared")
    snapshot_store.require_importable("mine")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", ".hidden", "-x", "x" * 64, "a\n", "a\0"])
def test_hazard_12_what_is_no_name(name):
    with pytest.raises(SnapshotError, match="no name for a snapshot"):
        snapshot_store.require_name(name)


@pytest.mark.parametrize("name", ["a", "Größe-1", "before.fit_2+3", "数据", "x" * 63])
def test_what_is_a_name(name):
    snapshot_store.require_name(name)


def test_a_restarted_kernel_owns_its_sessions_snapshots(make):
    old = make("a", owner_pid=1, owner_start=1)
    other = make("b", session="t", owner_pid=1, owner_start=1)
    snapshot_store.adopt("s")
    assert files.load(old.id).owner.alive()
    assert files.load(other.id) == other


def test_how_many_automatic_snapshots_are_kept(make, monkeypatch):
    monkeypatch.setattr(timetravel, "CHECKPOINTS", 3)
    monkeypatch.setattr(timetravel, "CHECKPOINT_BYTES", 100_000)
    made = [make(f"before-{number}", automatic=True) for number in range(5)]
    assert [one.name for one in timetravel._surplus(made)] == ["before-1", "before-0"]
    made.append(make("before-5", automatic=True, size=200_000))
    assert {one.name for one in timetravel._surplus(made)} == {f"before-{number}" for number in range(5)}


def test_when_a_snapshot_was_made_is_shown_in_local_time(make):
    snapshot = make("a")
    assert time.strftime("%Y-%m-%d", time.localtime(snapshot.created)) in snapshot_store.as_text([snapshot], here="")
