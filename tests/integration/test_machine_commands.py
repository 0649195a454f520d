"""`agentvm list`, `status`, `logs` and `destroy` with real machines of the toy guest."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from toy_guest import GREETING, wait_until_counting

from agentvm_kernel import cli
from agentvm_kernel.errors import HostError, UnknownMachineError
from agentvm_kernel.hypervisor import inventory
from agentvm_kernel.hypervisor.boot import boot_machine
from agentvm_kernel.hypervisor.console import Reader
from agentvm_kernel.hypervisor.machine import Machine
from agentvm_kernel.hypervisor.reap import remove_machine
from agentvm_kernel.sandbox import pool


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def refused(capsys, *arguments: str) -> str:
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("agentvm: ")
    return captured.err


def listed(capsys) -> list[dict]:
    assert cli.main(["list", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_without_machines(hypervisor, capsys):
    assert listed(capsys) == []
    assert cli.main(["list"]) == 0
    assert capsys.readouterr().out == "There are no machines.\n"
    assert cli.main(["destroy", "--all"]) == 0
    assert cli.main(["destroy", "--all", "--json"]) == 0
    assert capsys.readouterr().out == "There are no machines.\n[]\n"


@pytest.mark.parametrize("command", ["status", "logs", "destroy"])
@pytest.mark.parametrize("name", ["nobody", "../../etc", "a\x1b[31mb"])
def test_a_wrong_name_is_one_clear_error(hypervisor, capsys, command, name):
    said = refused(capsys, command, name)
    assert "There is no machine" in said
    assert "agentvm list" in said
    assert "\x1b" not in said


def test_a_running_machine_is_listed_with_what_it_takes(machine, capsys):
    wait_until_counting(machine)
    (found,) = listed(capsys)
    assert (found["name"], found["uuid"], found["uri"]) == (machine.name, machine.uuid, machine.hypervisor.uri)
    assert (found["state"], found["use"], found["profile"]) == ("running", "booting", "light")
    assert (found["owner_pid"], found["owner_alive"]) == (os.getpid(), True)
    assert found["qemu_pid"] == machine.qemu_pid
    assert found["pss_bytes"] > 1 << 20
    assert 0 < found["uptime_s"] < 60
    assert found["cpu_s"] > 0
    assert found["disk_bytes"] > 0
    assert found["template"] == ""
    assert inventory.find(machine.name).vcpus == machine.hardware.vcpus
    assert cli.main(["list"]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["Name", "State", "Use", "Owner"]
    assert line.split()[:5] == [machine.name, "running", "booting", "process", str(os.getpid())]


def test_the_status_follows_the_machine(machine, capsys):
    def shown() -> dict[str, str]:
        assert cli.main(["status", machine.name]) == 0
        return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())

    wait_until_counting(machine)
    assert shown()["State"] == "running"
    machine.pause()
    now = shown()
    assert now["State"] == "paused"
    assert now["QEMU"] == f"process {machine.qemu_pid}"
    assert now["Files"] == str(machine.files.folder)
    machine.stop()
    now = shown()
    assert (now["State"], now["QEMU"], now["Up"]) == ("gone", "-", "-")
    assert cli.main(["status", machine.name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == machine.name


def test_what_a_machine_is_used_as(machine):
    def use() -> str:
        return inventory.find(machine.name).use

    machine.update_tags(state="pooled")
    assert use() == "preparing"
    pool.offer(machine.files.folder, "0" * 16)
    assert use() == "ready"
    assert not inventory.find(machine.name).in_use
    assert pool.claim("*") == machine.name
    assert use() == "claimed"
    machine.update_tags(state="leased")
    assert use() == "leased"
    assert inventory.find(machine.name).in_use


def test_machines_of_another_state_folder_are_not_ours(machine, monkeypatch, guest_folder):
    with monkeypatch.context() as patch:
        patch.setenv("AGENTVM_STATE_DIR", str(guest_folder / "other"))
        assert inventory.list_machines() == []
        with pytest.raises(UnknownMachineError):
            inventory.find(machine.name)
    assert [info.name for info in inventory.list_machines()] == [machine.name]


def test_a_libvirt_that_does_not_answer(machine, capsys, monkeypatch, tmp_path):
    nobody = f"qemu+unix:///system?socket={tmp_path}/nobody"
    monkeypatch.setenv("AGENTVM_URI", nobody)
    assert "cannot be reached" in refused(capsys, "list")
    monkeypatch.delenv("AGENTVM_URI")
    record = machine.files.read_record()
    machine.files.write_record({**record, "uri": nobody})
    try:
        with pytest.raises(HostError):
            inventory.list_machines(nobody)
        # Another machine's libvirt is no reason not to show those of this one; here the domain itself is found.
        assert inventory.find(machine.name).state in ("running", "unknown")
    finally:
        machine.files.write_record(record)


def test_the_console_is_shown_and_followed_to_the_end(machine, hypervisor):
    wait_until_counting(machine)
    command = [sys.executable, "-m", "agentvm_kernel.cli", "logs", machine.name]
    root = Path(cli.__file__).parents[1]
    once = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert GREETING in once.stdout
    with subprocess.Popen(
        [*command, "--follow"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root
    ) as follower:
        assert GREETING in follower.stdout.readline()
        machine.shutdown()
        _, said = follower.communicate(timeout=20)
        assert follower.returncode == 0
        assert "the guest shut down" in said


def test_ctrl_c_ends_following(machine, capsys, monkeypatch):
    wait_until_counting(machine)

    def interrupted(self: Machine, timeout_s: float) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(Machine, "wait_stopped_reason", interrupted)
    assert cli.main(["logs", "-f", machine.name]) == 0
    assert capsys.readouterr().err == ""


def test_following_a_machine_that_has_ended_ends_at_once(machine, capsys):
    wait_until_counting(machine)
    machine.stop()
    assert cli.main(["logs", "-f", machine.name]) == 0
    captured = capsys.readouterr()
    assert GREETING in captured.out
    assert "has ended" in captured.err


HOSTILE = "\x1b]0;title\x07\x1b[2Jred\x1b[31m \x9b2J back\x08\x08 \u202eright to left\u202c\r\n\0tab\tend\n".encode()


def test_a_hostile_console_cannot_touch_the_terminal(machine, capsys):
    machine.files.serial_log.write_bytes(HOSTILE + b"\xff\xfe")
    assert cli.main(["logs", machine.name]) == 0
    shown = capsys.readouterr().out
    assert all(character in "\n\t" or character.isprintable() for character in shown)
    assert "tab\tend" in shown
    assert machine.console_tail(2).startswith("tab\tend")


def test_a_console_is_read_across_its_rotation_and_split_characters(tmp_path):
    log = tmp_path / "serial.log"
    log.write_bytes("first ü".encode()[:-1])
    with Reader(log) as reader:
        assert reader.read() == "first "
        assert reader.read() == ""
        with log.open("ab") as file:
            file.write("ü".encode()[1:] + b" old")
        log.rename(tmp_path / "serial.log.0")
        log.write_bytes(b"new\x1b")
        assert reader.read() == "ü old"
        assert reader.read() == "new"
        log.unlink()
        assert reader.read() == ""


def test_machines_are_destroyed_by_name(hypervisor, toy, capsys):
    image = toy()
    machines = [boot_machine(hypervisor, image, "light") for _ in range(3)]
    names = [machine.name for machine in machines]
    said = refused(capsys, "destroy", names[0], "nobody")
    assert "'nobody'" in said
    assert len(listed(capsys)) == 3
    assert cli.main(["destroy", names[0], names[0]]) == 0
    assert capsys.readouterr().out == f"Destroyed {names[0]}, which process {os.getpid()} was using.\n"
    assert not machines[0].files.folder.exists()
    assert not machines[0].files.sockets.exists()
    assert cli.main(["destroy", "--all", "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)) == sorted(names[1:])
    assert listed(capsys) == []
    assert not any(domain.name() in names for domain in hypervisor.domains())


@pytest.mark.parametrize("arguments", [[], ["x", "--all"]])
def test_destroy_wants_names_or_all(hypervisor, capsys, arguments):
    assert "--all" in refused(capsys, "destroy", *arguments)


def test_a_machine_that_is_destroyed_cannot_be_claimed_meanwhile(machine, capsys, monkeypatch):
    machine.update_tags(state="pooled")
    pool.offer(machine.files.folder, "0" * 16)
    claimed: list[str | None] = []

    def remove(hypervisor, name: str) -> None:
        claimed.append(pool.claim("*"))
        remove_machine(hypervisor, name)

    monkeypatch.setattr("agentvm_kernel.hypervisor.reap.remove_machine", remove)
    assert cli.main(["destroy", machine.name]) == 0
    assert claimed == [None]


def test_a_domain_of_the_users_own_with_the_name_of_a_leftover_is_left_alone(hypervisor, machine):
    wait_until_counting(machine)
    domain = machine.domain
    domain.setMetadata(2, None, "agentvm", "urn:agentvm:machine:1", 1)
    kept = machine.files.read_record()
    remove_machine(hypervisor, machine.name)
    assert not machine.files.folder.exists()
    assert domain.isActive()
    assert kept is not None


def test_machines_that_come_and_go_do_not_disturb_a_listing(hypervisor, toy):
    image = toy()
    stop = threading.Event()
    failures: list[BaseException] = []

    def look() -> None:
        while not stop.is_set():
            try:
                inventory.list_machines()
            except BaseException as error:
                failures.append(error)
                return

    looking = threading.Thread(target=look)
    looking.start()
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        boot_machine(hypervisor, image, "light").destroy()
    stop.set()
    looking.join()
    assert failures == []
