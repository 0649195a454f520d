"""Freezing and thawing on a real libvirt, with the toy guest: its counter shows to the instruction where it stood."""

import contextlib
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from toy_guest import COUNTER, MIRROR, counter, wait_until_counting

from agentvm_kernel.errors import HostError, SnapshotError, SnapshotMismatchError
from agentvm_kernel.hypervisor import garbage, mechanism
from agentvm_kernel.hypervisor import snapshot as store
from agentvm_kernel.hypervisor.boot import boot_machine
from agentvm_kernel.hypervisor.files import machines_dir, read_untrusted
from agentvm_kernel.hypervisor.freeze import freeze_live, freeze_template
from agentvm_kernel.hypervisor.garbage import collect, collect_garbage, delete, remove
from agentvm_kernel.hypervisor.machine import Machine, MachineState
from agentvm_kernel.hypervisor.memory import content_digest, ensure_memory, settle, sources
from agentvm_kernel.hypervisor.pages import find_mappings
from agentvm_kernel.hypervisor.qcow2 import backing_file
from agentvm_kernel.hypervisor.snapshot import Snapshot, list_all, load, update
from agentvm_kernel.hypervisor.thaw import thaw

pytestmark = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="needs QEMU")


only_pass_through = pytest.mark.parametrize("way", ["pass-through"], indirect=True)


@pytest.fixture(params=["pass-through", "internal"])
def way(request, monkeypatch):
    """How machines are frozen and thawed: all tests that use `template` run both ways, unless they are about how memory is kept."""
    monkeypatch.setenv(mechanism.VARIABLE, request.param)
    return request.param


@pytest.fixture
def template(hypervisor, toy, way):
    """A template of a counting toy guest."""
    machine = boot_machine(hypervisor, toy(), "light", template=True)
    try:
        wait_until_counting(machine)
        made = freeze_template(machine)
    finally:
        machine.destroy()
    yield made
    shutil.rmtree(store.snapshots_dir())
    shutil.rmtree(store.layers_dir())


@pytest.fixture
def thawed(hypervisor):
    """`thawed(snapshot)` gives a machine that is destroyed when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(snapshot: Snapshot, **options) -> Machine:
            machine = thaw(hypervisor, snapshot, **options)
            stack.callback(machine.destroy)
            return machine

        yield make


def test_a_template_can_be_thawed_many_times_and_each_goes_its_own_way(template, thawed):
    first, second = thawed(template), thawed(template)
    frozen = counter(first)
    assert first.state is MachineState.PAUSED
    assert counter(second) == frozen > 0
    first.resume()
    assert _counts_on(first, frozen)
    assert counter(second) == frozen
    assert len({first.name, second.name}) == len({first.uuid, second.uuid}) == 2
    assert _genid(first) != _genid(second)
    assert first.address != second.address


def test_what_freezing_a_template_leaves(template, hypervisor):
    assert template.is_template
    assert list_all() == [template] == [load(template.id)]
    assert list(machines_dir().iterdir()) == []


def test_hazard_8_nobody_in_qemu_can_change_what_others_are_thawed_from(template, hypervisor):
    memory = template.disk if template.internal else template.memory
    for path in (memory, template.state, template.disk, template.secret, template.domain_xml):
        assert path.stat().st_uid == os.geteuid()
    assert template.disk.stat().st_mode & 0o777 == 0o444
    assert template.secret.stat().st_mode & 0o777 == 0o400
    assert template.internal or memory.stat().st_mode & 0o007 == 0


@pytest.mark.parametrize("name", ["memory", "state"])
def test_hazard_8_a_changed_file_is_noticed_and_refused(template, thawed, name):
    path = template.disk if template.internal else template.folder / name
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.seek(100)
        file.write(b"tampered")
    with pytest.raises(SnapshotMismatchError, match="is not the one that was frozen"):
        thawed(template)


@only_pass_through
def test_files_that_were_only_copied_are_checked_and_taken(template, thawed):
    copy = template.memory.with_name("copy")
    shutil.copy(template.memory, copy)
    copy.replace(template.memory)
    assert counter(thawed(template)) > 0


def test_a_running_machine_is_frozen_and_runs_on(template, thawed, way):
    machine = thawed(template)
    machine.resume()
    assert _counts_on(machine, 0)
    frozen = freeze_live(machine, name="before", description="all is well")
    assert machine.state is MachineState.RUNNING
    assert (frozen.name, frozen.description) == ("before", "all is well")
    assert not frozen.memory.exists()
    if way == "pass-through":
        assert frozen.parent == template.id
        assert 0 < frozen.pages < 1000
    again = thawed(frozen)
    at_freeze = counter(again)
    assert counter(again, MIRROR) in (at_freeze, at_freeze - 1)
    assert _counts_on(machine, at_freeze)
    again.resume()
    assert _counts_on(again, at_freeze)


def test_a_paused_machine_stays_paused_when_it_is_frozen(template, thawed):
    machine = thawed(template)
    before = counter(machine)
    frozen = freeze_live(machine)
    assert machine.state is MachineState.PAUSED
    assert counter(thawed(frozen)) == before


@only_pass_through
def test_parent_and_delta_are_the_whole_memory_to_the_byte(template, thawed, hypervisor):
    machine = thawed(template)
    machine.resume()
    assert _counts_on(machine, 0)
    machine.pause()
    frozen = freeze_live(machine)
    # What QEMU itself says about the memory below the video memory and above the firmware.
    dump = machine.files.sockets / "dump"
    for start, size in ((0, 0xA0000), (0x100000, 64 << 20)):
        machine.qmp("pmemsave", val=start, size=size, filename=str(dump))
        with open(ensure_memory(hypervisor, frozen), "rb") as memory:
            memory.seek(start)
            assert memory.read(size) == dump.read_bytes()
        dump.unlink()


def test_snapshots_of_snapshots_form_a_tree(template, thawed, way):
    first = freeze_live(thawed(template), name="first")
    machine = thawed(first)
    machine.resume()
    second, third = freeze_live(machine, name="second"), freeze_live(machine, name="third")
    if way == "pass-through":
        assert [second.parent, third.parent] == [first.id, first.id]
    deepest = thawed(third)
    deepest.resume()
    assert _counts_on(deepest, counter(thawed(second)))
    layers, layer = [], deepest.overlay
    while (below := backing_file(layer)) is not None:
        layers.append(below)
        layer = below
    if way == "pass-through":
        assert layers[:4] == [third.disk, second.disk, first.disk, template.disk]
    else:  # a machine's image is a copy of its snapshot's layer
        assert layers[:1] == [second.disk]


@only_pass_through
def test_deleting_a_snapshot_keeps_what_its_children_need(template, thawed, hypervisor):
    machine = thawed(template)
    middle = freeze_live(machine, name="middle")
    with pytest.raises(SnapshotError, match=rf"in use by {machine.name}"):
        delete(template)
    leaf_maker = thawed(middle)
    leaf = freeze_live(leaf_maker, name="leaf")
    value = counter(leaf_maker)
    for each in (machine, leaf_maker):
        each.destroy()
    delete(middle)
    assert load(leaf.id).parent == template.id
    assert counter(thawed(load(leaf.id))) == value
    with contextlib.suppress(SnapshotError):
        delete(template)  # the machine just thawed maps its memory
    assert load(template.id) == template
    with pytest.raises(SnapshotError, match="There is no snapshot"):
        load(middle.id)


@only_pass_through
def test_the_last_snapshot_of_a_deleted_template_has_all_of_its_memory(template, hypervisor):
    maker = thaw(hypervisor, template)
    leaf = freeze_live(maker, name="leaf")
    value = counter(maker)
    maker.destroy()
    delete(template)
    left = load(leaf.id)
    assert (left.parent, left.pages, left.is_template) == ("", 0, False)
    again = thaw(hypervisor, left)
    assert counter(again) == value
    again.destroy()


@only_pass_through
def test_a_snapshot_is_written_against_the_one_before_it_in_its_history(template, thawed, hypervisor):
    machine = thawed(template)
    machine.resume()
    made = []
    for number in range(4):
        assert _counts_on(machine, counter(machine))
        made.append(freeze_live(machine, name=f"n{number}", session="s", after=made[-1].id if made else ""))
    machine.pause()
    assert [one.parent for one in made] == [template.id, *(one.id for one in made[:-1])]
    assert max(one.pages for one in made[1:]) < made[0].pages
    base, above = sources(hypervisor, made[-1])
    assert (base.id, [one.id for one in above]) == (template.id, [one.id for one in reversed(made)])
    values = [counter(thawed(one)) for one in made]
    assert values == sorted(set(values))
    # What a machine that was filled from the chain has is what a file built of it has.
    last = thawed(made[-1])
    further = freeze_live(last, session="s", after=made[-1].id)
    assert further.parent == made[-1].id
    assert further.pages < 10
    for one in (made[-1], further):
        with open(ensure_memory(hypervisor, one), "rb") as memory:
            memory.seek(COUNTER)
            assert int.from_bytes(memory.read(4), "little", signed=True) == values[-1]
    # With a memory file of its own it is mapped, and the next one rests on that.
    mapped = thawed(further)
    assert mapped.memory_of == further.id
    assert counter(mapped) == values[-1]


@only_pass_through
def test_deleting_from_the_middle_of_a_chain_merges(template, thawed, hypervisor):
    machine = thawed(template)
    made, values = [], []
    for _ in range(5):
        machine.resume()
        assert _counts_on(machine, counter(machine))
        machine.pause()
        values.append(counter(machine))
        made.append(freeze_live(machine, session="s", after=made[-1].id if made else ""))
    for number in (3, 1, 0):
        delete(load(made[number].id))
    left = [load(made[number].id) for number in (2, 4)]
    assert [one.parent for one in left] == [template.id, left[0].id]
    assert [one.after for one in left] == ["", left[0].id]
    assert [counter(thawed(one)) for one in left] == [values[2], values[4]]


@only_pass_through
def test_where_qemus_memory_is_closed_to_us_a_file_is_built(template, thawed, hypervisor, monkeypatch):
    machine = thawed(template)
    machine.resume()
    assert _counts_on(machine, 0)
    machine.pause()
    frozen = freeze_live(machine)

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("agentvm_kernel.hypervisor.thaw.apply_to_process", refuse)
    for _ in range(2):
        again = thawed(frozen)
        assert again.memory_of == frozen.id
        assert counter(again) == counter(machine)
    assert hypervisor.memory_is_closed


@only_pass_through
def test_a_libvirt_that_knows_nothing_of_the_capability_left_out_is_asked_without_it(
    template, thawed, hypervisor, monkeypatch
):
    monkeypatch.setattr("agentvm_kernel.hypervisor.thaw.CPU_QUESTIONS", "no-such-capability")
    for _ in range(2):
        machine = thawed(template)
        machine.resume()
        assert _counts_on(machine, 0)
        assert hypervisor.capabilities_refused


@only_pass_through
def test_hazard_8_a_changed_delta_is_noticed_with_and_without_its_digest(template, thawed):
    machine = thawed(template)
    machine.resume()
    assert _counts_on(machine, 0)
    for settled in (False, True):
        frozen = freeze_live(machine)
        if settled:
            frozen = settle(frozen)
            assert set(frozen.digests) == {"state", "delta"}
        frozen.delta.chmod(0o600)
        with open(frozen.delta, "r+b") as file:
            file.seek(5000)
            file.write(b"tampered")
        with pytest.raises(SnapshotMismatchError, match=r"not the one that was frozen"):
            thawed(frozen)
        with pytest.raises(SnapshotMismatchError, match=r"changed|not the one"):
            settle(replace(frozen, digests={}))


def test_what_a_session_leaves_is_collected_but_not_what_was_exported(template, hypervisor, monkeypatch):
    monkeypatch.setattr(garbage, "UNFINISHED_S", -1)
    machine = thaw(hypervisor, template)
    kept, ended, hidden, living = (
        freeze_live(machine, name=name, session="s") for name in ("kept", "ended", "hidden", "living")
    )
    gone = {"owner_pid": 1, "owner_start": 12345}
    update(kept, exported=True, **gone)
    update(ended, **gone)
    remove(hidden)
    update(living, name="living")
    assert collect() == []  # a session that ended a moment ago may be a kernel that is being restarted
    monkeypatch.setattr(garbage, "RESTART_S", -1)
    assert collect()[0] == ended.id
    assert {one.name for one in list_all() if not one.is_template} == {"kept", "living"}
    in_use = thaw(hypervisor, load(living.id))
    remove(living)
    assert load(living.id).name == ""
    assert collect() == []
    for each in (machine, in_use):
        each.destroy()
    assert living.id in collect()
    assert {one.name for one in list_all() if not one.is_template} == {"kept"}


def test_metadata_of_an_older_version_are_read(template):
    import json

    values = json.loads((template.folder / "snapshot.json").read_bytes())
    for name in ("session", "after", "automatic", "exported", "owner_pid", "owner_start"):
        del values[name]
    assert Snapshot.from_json(json.dumps(values).encode()) == template
    for wrong in ({"exported": 1}, {"name": ["x"]}, {"after": "../.."}, {"created": "now"}):
        with pytest.raises(ValueError, match=r"wrong kind|malformed"):
            Snapshot.from_json(json.dumps(values | wrong).encode())


def test_layers_that_nobody_needs_are_removed_but_not_those_just_made(template, hypervisor, monkeypatch):
    lonely, partial = store.layer_path("0" * 16), store.snapshots_dir() / ".partial-x"
    shutil.copy(template.disk, lonely)
    partial.mkdir()
    assert collect_garbage() == []
    monkeypatch.setattr(garbage, "UNFINISHED_S", -1)
    assert set(collect_garbage()) == {lonely.name, partial.name}
    assert template.disk.exists()


def test_a_freeze_that_fails_leaves_no_snapshot_and_a_machine_that_runs(template, thawed, way, monkeypatch):
    machine = thawed(template)
    machine.resume()

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        step = "freeze.write_changes" if way == "pass-through" else "internal.move_disk"
        patch.setattr(f"agentvm_kernel.hypervisor.{step}", fail)
        with pytest.raises(OSError, match="No space"):
            freeze_live(machine)
    assert machine.state is MachineState.RUNNING
    assert list_all() == [template]
    machine.pause()
    assert counter(thawed(freeze_live(machine))) == counter(machine)


def test_a_freeze_that_fails_after_the_disk_moved_on_does_not_spoil_later_ones(template, thawed, way, monkeypatch):
    machine = thawed(template)
    with monkeypatch.context() as patch:
        module = "freeze" if way == "pass-through" else "internal"
        patch.setattr(
            f"agentvm_kernel.hypervisor.{module}.finish", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O error"))
        )
        with pytest.raises(OSError, match="I/O error"):
            freeze_live(machine)
    frozen = freeze_live(machine)
    assert counter(thawed(frozen)) == counter(machine)


def test_only_thawed_machines_can_be_frozen_and_only_prepared_ones_become_templates(machine):
    with pytest.raises(SnapshotError, match="was booted and not thawed"):
        freeze_live(machine)
    with pytest.raises(SnapshotError, match="template=True"):
        freeze_template(machine)
    assert machine.state is MachineState.RUNNING


def test_hazard_19_a_snapshot_of_another_qemu_or_cpu_is_refused_with_what_differs(
    template, thawed, hypervisor, monkeypatch
):
    monkeypatch.setattr(type(hypervisor), "qemu_version", (99, 1, 2))
    monkeypatch.setattr(type(hypervisor), "cpu_model", lambda self, kind: "Z80")
    with pytest.raises(
        SnapshotMismatchError, match=r"made by QEMU [\d.]+, here is 99.1.2; its CPU was \w+, here it is Z80"
    ):
        thawed(template)
    assert load(template.id) == template


@pytest.mark.parametrize("bad", ["../../etc/passwd", "", "x" * 16, "ABCDEF0123456789", "0" * 15])
def test_hazard_12_an_id_is_never_a_path(own_folders, bad):
    with pytest.raises(SnapshotError, match="no id of a snapshot"):
        load(bad)


def test_damaged_metadata_do_not_hide_the_other_snapshots(template):
    broken = store.snapshots_dir() / ("a" * 16)
    broken.mkdir()
    (broken / "snapshot.json").write_text('{"id": "../x"}')
    assert list_all() == [template]
    with pytest.raises(SnapshotError, match="damaged"):
        load("a" * 16)


def test_a_state_that_qemu_cannot_load_is_an_error_and_leaves_no_machine(template, thawed):
    path = template.state
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:2000])
    changed = template.digests | {"state": content_digest(path)}
    (template.folder / "snapshot.json").write_bytes(store.replace(template, digests=changed).to_json())
    with pytest.raises(Exception, match=r"could not load|ended|QEMU|does not exist"):
        thawed(load(template.id))
    assert list(machines_dir().iterdir()) == []


def test_several_machines_can_be_thawed_at_once(template, hypervisor):
    machines: list[Machine] = []
    threads = [threading.Thread(target=lambda: machines.append(thaw(hypervisor, template))) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len({counter(machine, COUNTER) for machine in machines}) == 1
        assert len(machines) == 4
    finally:
        for machine in machines:
            machine.destroy()


@only_pass_through
def test_a_process_that_maps_nothing_of_the_snapshot_is_not_read(template):
    with pytest.raises(SnapshotError, match="does not map"):
        find_mappings(os.getpid(), template.memory)


def test_hazard_13_what_qemu_writes_is_no_way_to_other_files(tmp_path):
    (tmp_path / "ours").write_text("secret")
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    with pytest.raises(OSError, match="symbolic links"):
        read_untrusted(tmp_path / "link", 100)
    os.link(tmp_path / "ours", tmp_path / "hard")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "hard", tmp_path / "pipe"):
        with pytest.raises(HostError, match="not what QEMU should have written"):
            read_untrusted(path, 100)
    (tmp_path / "hard").unlink()
    with pytest.raises(HostError):
        read_untrusted(tmp_path / "ours", 3)
    assert read_untrusted(tmp_path / "ours", 6) == b"secret"


def _counts_on(machine: Machine, value: int) -> bool:
    """Whether the guest's counter goes beyond `value`; it does so millions of times a second."""
    return any(counter(machine) > value for _ in range(2000))


def _genid(machine: Machine) -> str:
    return machine.domain.XMLDesc().split("<genid>")[1].split("</genid>")[0]


def test_the_folders_of_snapshots_are_below_the_state_directory(own_folders):
    assert store.snapshots_dir() == Path(os.environ["AGENTVM_STATE_DIR"]) / "snapshots"
