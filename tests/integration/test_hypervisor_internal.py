"""What is particular to freezing and thawing by internal snapshots, and how it is found out that this is needed.

That machines are frozen and thawed rightly that way, too, is shown by test_hypervisor_snapshots.py.
"""

import os
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest
from toy_guest import counter, wait_until_counting

from agentvm_kernel.errors import ConfigError, LibvirtError, MonitorError, SnapshotError
from agentvm_kernel.hypervisor import archive, internal, mechanism
from agentvm_kernel.hypervisor import snapshot as store
from agentvm_kernel.hypervisor.boot import boot_machine
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import MachineFiles, machines_dir
from agentvm_kernel.hypervisor.freeze import freeze_live, freeze_template
from agentvm_kernel.hypervisor.machine import Machine
from agentvm_kernel.hypervisor.reap import qemu_alive, reap
from agentvm_kernel.hypervisor.snapshot import Snapshot, differences
from agentvm_kernel.hypervisor.tags import Owner, Tags
from agentvm_kernel.hypervisor.thaw import own_xml, thaw
from agentvm_kernel.image.store import Image
from agentvm_kernel.sandbox.templates import obstacles

pytestmark = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="needs QEMU")


@pytest.fixture
def template(hypervisor: Hypervisor, toy: Callable[..., Image], monkeypatch: pytest.MonkeyPatch) -> Iterator[Snapshot]:
    """A template made by internal snapshot, of a counting toy guest."""
    monkeypatch.setenv(mechanism.VARIABLE, "internal")
    machine = boot_machine(hypervisor, toy(), "light", template=True)
    try:
        assert "qemu:" not in machine.domain.XMLDesc()
        wait_until_counting(machine)
        made = freeze_template(machine)
    finally:
        machine.destroy()
    yield made
    shutil.rmtree(store.snapshots_dir())
    shutil.rmtree(store.layers_dir())


@pytest.fixture
def machine(hypervisor: Hypervisor, template: Snapshot) -> Iterator[Machine]:
    """A machine thawed from it."""
    machine = thaw(hypervisor, template)
    yield machine
    machine.destroy()


def test_a_thawed_machine_is_an_ordinary_one_for_libvirt(machine: Machine) -> None:
    domain = machine.domain
    assert not domain.isPersistent()
    assert domain.snapshotNum() == 0
    assert "qemu:" not in domain.XMLDesc()
    assert qemu_alive(machine.files)


def test_a_frozen_copy_holds_the_memory_once(machine: Machine, template: Snapshot) -> None:
    listing = ["qemu-img", "snapshot", "-l", "-U"]
    assert internal.NAME in subprocess.run([*listing, template.disk], capture_output=True, text=True, check=True).stdout
    assert not subprocess.run([*listing, machine.overlay], capture_output=True, text=True, check=True).stdout
    live = freeze_live(machine)
    assert live.disk.stat().st_blocks < 1.2 * template.disk.stat().st_blocks


def test_a_thaw_whose_process_died_half_way_is_cleared_up(hypervisor: Hypervisor, template: Snapshot) -> None:
    files = MachineFiles.of("agentvm-halfway")
    files.claim()
    dead = {"owner": Owner(1, 12345), "folder": files.folder, "template": template.id, "state": "leased"}
    machine = Machine(
        hypervisor,
        files,
        uuid="0b1ce5d6-7c06-4f0c-8a36-0e6a0e9a7a11",
        hardware=template.hardware,
        tags=Tags(**dead),
        secret=b"",
    )
    files.prepare(hypervisor.qemu_user, machine.record())
    xml = ElementTree.tostring(own_xml(template, machine), encoding="unicode")
    domain = hypervisor.connection().defineXML(xml)
    domain.snapshotCreateXML(internal._known_snapshot(xml), libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE)
    assert files.name in reap(hypervisor)  # and what others have left behind
    assert files.name not in [each.name() for each in hypervisor.domains()]
    assert list(machines_dir().iterdir()) == []


def test_the_image_of_a_machine_is_its_own(hypervisor: Hypervisor, machine: Machine, template: Snapshot) -> None:
    before = counter(machine)
    machine.resume()
    while counter(machine) == before:
        pass
    other = thaw(hypervisor, template)
    assert counter(other) == before
    assert os.stat(other.overlay).st_ino != os.stat(machine.overlay).st_ino != os.stat(template.disk).st_ino
    other.destroy()


def test_a_template_made_the_other_way_is_not_taken(
    hypervisor: Hypervisor, template: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert obstacles(hypervisor, template) == []
    monkeypatch.setenv(mechanism.VARIABLE, "pass-through")
    assert "the other way" in obstacles(hypervisor, template)[0]


def test_a_snapshot_that_needs_pass_through_is_refused_where_there_is_none(
    hypervisor: Hypervisor, template: Snapshot, tmp_path: Path
) -> None:
    assert differences(hypervisor, template) == []
    other = replace(template, internal=False)
    assert any("needs pass-through to QEMU" in text for text in differences(hypervisor, other))
    with pytest.raises(SnapshotError, match="cannot be written to a file"):
        archive.write(hypervisor, template, tmp_path / "x")


def test_a_host_that_starts_no_machine_at_all_is_not_taken_for_one_that_refuses_pass_through(
    hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(mechanism.VARIABLE, raising=False)
    monkeypatch.setattr("agentvm_kernel.hypervisor.domain_xml.MACHINE_TYPE", "abacus")
    with pytest.raises(LibvirtError, match="abacus"):
        mechanism.probe(hypervisor)
    assert list(machines_dir().iterdir()) == []


def test_where_pass_through_works_it_is_used_and_asked_for_once(
    hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(mechanism.VARIABLE, raising=False)
    mechanism._record().unlink(missing_ok=True)
    assert mechanism.known(hypervisor) is None
    found = mechanism.choose(hypervisor)
    assert found.kind == "pass-through"
    assert list(machines_dir().iterdir()) == []
    monkeypatch.setattr(mechanism, "probe", None)
    assert mechanism.choose(hypervisor) == found
    monkeypatch.setattr(type(hypervisor), "qemu_version", (99, 0, 0))
    assert mechanism.known(hypervisor) is None


def test_where_the_monitor_is_refused_internal_snapshots_are_used(
    hypervisor: Hypervisor, toy: Callable[..., Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(mechanism.VARIABLE, raising=False)
    mechanism._record().unlink(missing_ok=True)

    def refuse(_self: Hypervisor, _domain: object, command: str, **_: object) -> None:
        raise MonitorError("CommandNotFound", f"{command} failed: access denied.")

    with monkeypatch.context() as patch:
        patch.setattr(Hypervisor, "qmp", refuse)
        found = mechanism.choose(hypervisor)
        assert (found.kind, found.reason.startswith("pass-through to QEMU is refused: xen-save")) == ("internal", True)
        machine = boot_machine(hypervisor, toy(), "light", template=True)
    wait_until_counting(machine)  # looks through the monitor
    with monkeypatch.context() as patch:
        patch.setattr(Hypervisor, "qmp", refuse)
        template = freeze_template(machine)
        thawed = thaw(hypervisor, template)
        thawed.resume()
        live = internal.freeze_live(thawed, name="live", description="", resume=True)
        thaw(hypervisor, live).destroy()
        thawed.destroy()
    assert template.internal
    monkeypatch.setattr(mechanism, "REFUSED_S", -1)
    assert mechanism.known(hypervisor) is None
    mechanism._record().unlink()
    shutil.rmtree(store.snapshots_dir())
    shutil.rmtree(store.layers_dir())


def test_a_libvirt_that_refuses_the_namespace_shows_why(
    hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(mechanism.VARIABLE, raising=False)
    # QEMU itself refuses the argument, as it would a file that AppArmor keeps from it.
    monkeypatch.setattr("agentvm_kernel.hypervisor.thaw.INCOMING_ARGUMENTS", ("-object", "no-such-thing,id=x"))
    found = mechanism.probe(hypervisor)
    assert found.kind == "internal"
    assert "no-such-thing" in found.reason
    assert list(machines_dir().iterdir()) == []
    mechanism._record().unlink()


def test_another_value_than_the_three_is_refused(hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(mechanism.VARIABLE, "magic")
    with pytest.raises(ConfigError, match="It can be auto, pass-through or internal"):
        mechanism.choose(hypervisor)
