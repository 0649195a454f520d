"""Templates of the toy guest: found, built once, never used when damaged or made by something else, listed and removed."""

import asyncio
import contextlib
import json
import shutil
from dataclasses import replace

import pytest
from toy_guest import counter, wait_until_counting

from agentvm_kernel import cli
from agentvm_kernel.errors import BootError, SnapshotError
from agentvm_kernel.hypervisor import snapshot as store
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.freeze import freeze_live
from agentvm_kernel.hypervisor.garbage import delete
from agentvm_kernel.hypervisor.machine import Machine
from agentvm_kernel.hypervisor.memory import content_digest
from agentvm_kernel.hypervisor.snapshot import Snapshot, list_all
from agentvm_kernel.hypervisor.thaw import thaw
from agentvm_kernel.sandbox import template_store, templates


@pytest.fixture
def image(toy):
    return toy()


@pytest.fixture
def boots(monkeypatch, hypervisor):
    """Templates are of the toy guest, which has no runtime to wait for; gives the names of the machines that were booted."""
    booted: list[str] = []

    async def settle(machine: Machine, **_: object) -> None:
        booted.append(machine.name)
        await asyncio.to_thread(wait_until_counting, machine)

    monkeypatch.setattr(templates, "settle", settle)
    yield booted
    for folder in (store.snapshots_dir(), store.layers_dir()):
        shutil.rmtree(folder)


@pytest.fixture
def use(hypervisor, image, boots):
    """`use()` gives a machine that was thawed as a lease's is."""
    with contextlib.ExitStack() as stack:

        async def thawed(template: Snapshot) -> Machine:
            machine = await asyncio.to_thread(thaw, hypervisor, template)
            stack.callback(machine.destroy)
            return machine

        def make() -> Machine:
            return asyncio.run(templates.use(hypervisor, image, "light", thawed, timeout_s=30))

        yield make


def only() -> Snapshot:
    (snapshot,) = list_all()
    return snapshot


def test_a_template_is_built_once_by_whoever_comes_first(hypervisor, image, boots):
    said: list[str] = []

    async def several() -> list[Snapshot]:
        return await asyncio.gather(
            *(templates.ensure(hypervisor, image, "light", timeout_s=30, on_progress=said.append) for _ in range(3))
        )

    found = asyncio.run(several())
    assert found == [only()] * 3
    assert len(boots) == 1
    assert said[0].startswith("Waiting for another process")
    assert templates.find(hypervisor, image, "standard") is None
    assert templates.find(hypervisor, replace(image, digest="1" * 64), "light") is None
    assert templates.find(hypervisor, image, "light", without={found[0].id}) is None


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *[(name, damage) for name in ("memory", "state") for damage in ("changed", "truncated", "lost")],
        ("domain.xml", "truncated"),
        ("domain.xml", "lost"),
        ("secret", "lost"),
    ],
)
def test_a_damaged_template_is_built_anew_once_and_never_used(use, boots, name, damage):
    use().destroy()
    old = only()
    path = old.folder / name
    path.chmod(0o600)
    if damage == "lost":
        path.unlink()
    elif damage == "truncated":
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
    else:
        with path.open("r+b") as file:
            file.seek(100)
            file.write(b"tampered")
    assert counter(use()) > 0
    assert only().id != old.id
    assert len(boots) == 2
    use()
    assert len(boots) == 2


def test_a_template_that_qemu_cannot_load_is_built_anew_once(use, boots):
    use().destroy()
    old = only()
    # As if another build of the same QEMU version did not understand it: nothing is damaged as far as digests tell.
    old.state.chmod(0o600)
    old.state.write_bytes(old.state.read_bytes()[:2000])
    new = replace(old, digests={**old.digests, "state": content_digest(old.state)})
    (old.folder / "snapshot.json").write_bytes(new.to_json())
    assert counter(use()) > 0
    assert len(boots) == 2
    assert only().id != old.id


def test_when_the_new_template_is_no_better_that_is_an_error(hypervisor, image, boots):
    tried: list[str] = []

    async def broken(template: Snapshot) -> Machine:
        tried.append(template.id)
        raise SnapshotError("QEMU could not load it.")

    with pytest.raises(SnapshotError, match="could not load"):
        asyncio.run(templates.use(hypervisor, image, "light", broken, timeout_s=30))
    assert len(set(tried)) == len(tried) == len(boots) == 2


def test_a_damaged_template_that_a_machine_rests_on_stays_and_is_not_used(use, boots):
    holder = use()
    old = only()
    old.memory.chmod(0o600)
    with old.memory.open("r+b") as file:
        file.write(b"tampered")
    other = use()
    assert other.tags.template != old.id
    assert {snapshot.id for snapshot in list_all()} == {old.id, other.tags.template}
    assert holder.state.value == "paused"
    assert use().tags.template == other.tags.template
    assert len(boots) == 2


@pytest.mark.parametrize("what", ["qemu", "cpu", "runtime", "accelerator", "vsock"])
def test_a_template_of_something_else_is_kept_and_not_used(use, boots, hypervisor, what):
    use().destroy()
    old = only()
    if what in ("qemu", "cpu"):
        stale = replace(old, **{what: "another"})
    else:
        other = {
            "runtime": "0" * 64,
            "accelerator": "kvm" if old.hardware.accelerator == "tcg" else "tcg",
            "vsock": True,
        }
        stale = replace(old, hardware=replace(old.hardware, **{what: other[what]}))
    (old.folder / "snapshot.json").write_bytes(stale.to_json())
    assert len(templates.obstacles(hypervisor, stale)) == 1
    assert use().tags.template != old.id
    assert len(boots) == 2
    assert len(list_all()) == 2


def test_templates_that_an_update_left_behind_go_after_a_while(use, boots):
    use().destroy()
    first = replace(only(), qemu="1.0")
    (first.folder / "snapshot.json").write_bytes(first.to_json())
    use().destroy()
    second = next(one for one in list_all() if one.id != first.id)
    old = {"qemu": "1.0", "created": second.created - 2 * template_store.OUTDATED_S}
    for one in (first, second):
        (one.folder / "snapshot.json").write_bytes(replace(one, **old).to_json())
    holder = use()
    assert only().id == holder.tags.template
    assert len(boots) == 3


def test_a_snapshot_that_has_lost_its_parents_never_becomes_a_template(use, hypervisor, image):
    machine = use()
    freeze_live(machine, name="mine")
    machine.destroy()
    delete(next(one for one in list_all() if one.is_template))
    assert only().parent == ""
    assert templates.find(hypervisor, image, "light") is None


def test_a_machine_that_does_not_boot_leaves_nothing(hypervisor, image, monkeypatch, boots):
    async def settle(machine: Machine, **_: object) -> None:
        raise BootError("It says nothing.")

    monkeypatch.setattr(templates, "settle", settle)
    released: list[str] = []
    monkeypatch.setattr(Machine, "release", lambda self: (released.append(self.name), self.destroy()))
    with pytest.raises(BootError, match="did not come up: It says nothing"):
        asyncio.run(templates.ensure(hypervisor, image, "light", timeout_s=30))
    assert len(released) == 1
    assert list_all() == []


# ---- the commands


@pytest.fixture
def commands(monkeypatch, image, use, tmp_path):
    """`agentvm template` finds the toy image."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr("agentvm_kernel.image.store.list_images", lambda: [image])


def run(capsys, *arguments: str) -> str:
    assert cli.main(["template", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    assert cli.main(["template", *arguments]) == 1
    return capsys.readouterr().err


def test_a_template_is_built_and_listed_by_command(commands, capsys, boots):
    assert "agentvm template build" in run(capsys, "list")
    assert run(capsys, "build", "--image", "toy", "--profile", "light").startswith("Built the template ")
    assert "is there already" in run(capsys, "build", "--image", "toy", "--profile", "light")
    built = json.loads(run(capsys, "build", "--image", "toy", "--profile", "light", "--json"))
    assert len(boots) == 1
    assert built["id"] == only().id
    assert json.loads(run(capsys, "list", "--json")) == [built]
    assert json.loads(run(capsys, "list", "--json", "--profile", "standard")) == []
    assert json.loads(run(capsys, "list", "--json", "--image", "0" * 8)) == [built]
    assert json.loads(run(capsys, "list", "--json", "--image", "other")) == []
    assert (built["image_name"], built["profile"], built["machines"], built["snapshots"]) == ("toy", "light", [], 0)
    assert built["obstacles"] == []
    line = run(capsys, "list").splitlines()[1].split()
    assert (line[:3], line[-1]) == ([only().id, "toy", "light"], "yes")


def test_a_template_in_use_is_not_removed(commands, capsys, use):
    machine = use()
    template = only()
    assert machine.name in refused(capsys, "remove", template.id)
    assert json.loads(run(capsys, "list", "--json"))[0]["machines"] == [machine.name]
    machine.destroy()
    assert run(capsys, "remove", template.id[:6]) == f"Removed the template {template.id} (light).\n"
    assert list_all() == []


def test_only_unusable_templates_are_removed_when_that_is_asked_for(commands, capsys, use):
    use().destroy()
    stale = replace(only(), qemu="1.0")
    (stale.folder / "snapshot.json").write_bytes(stale.to_json())
    use().destroy()
    assert "no: it was made by QEMU 1.0" in run(capsys, "list").splitlines()[1]
    assert json.loads(run(capsys, "remove", "--unusable", "--json")) == [stale.id]
    assert run(capsys, "remove", "--unusable") == "There are no such templates.\n"
    assert len(list_all()) == 1
    assert len(json.loads(run(capsys, "remove", "--image", "toy", "--profile", "light", "--json"))) == 1


def test_wrong_ids_images_and_profiles_are_clear_errors(commands, capsys):
    assert "Which templates?" in refused(capsys, "remove")
    assert "There is no template 'ffff'" in refused(capsys, "remove", "ffff")
    assert "There is no guest image 'none'" in refused(capsys, "build", "--image", "none")
    for action in ("build", "list", "remove"):
        assert "'huge'" in refused(capsys, action, "--profile", "huge")


def test_doctor_tells_whether_there_is_a_template(commands, hypervisor: Hypervisor, use):
    from agentvm_kernel import doctor
    from agentvm_kernel.sandbox.settings import SandboxSettings

    settings = SandboxSettings(profile="light", image="toy")
    row = doctor.check_template(settings)
    assert row.status == "warn"
    assert row.mend.endswith("agentvm template build")
    use().destroy()
    row = doctor.check_template(settings)
    assert (row.status, row.detail.split()[0]) == ("ok", only().id)
    assert doctor.check_template(replace(settings, image="none")).status == "warn"
