"""Every check of `agentvm doctor`, on hosts that lack what it looks for."""

import json
import os
import sys
import threading

import pytest

from agentvm_kernel import cli, doctor
from agentvm_kernel.doctor import Row
from agentvm_kernel.hypervisor import accelerator, mechanism
from agentvm_kernel.sandbox.settings import SandboxSettings

SETTINGS = SandboxSettings()


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AGENTVM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for folder in ("CACHE", "STATE", "RUN"):
        monkeypatch.setenv(f"AGENTVM_{folder}_DIR", str(tmp_path / folder.lower()))


@pytest.fixture
def empty_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_no_qemu(empty_path):
    row = doctor.check_qemu()
    assert (row.status, row.mend) == ("fail", "apt-get install qemu-system-x86")


def test_a_qemu_that_does_not_run(empty_path):
    binary = empty_path / "qemu-system-x86_64"
    binary.write_text("#!/bin/sh\necho no such library >&2\nexit 127\n")
    binary.chmod(0o755)
    row = doctor.check_qemu()
    assert row.status == "fail"
    assert "no such library" in row.detail


def test_qemu_with_its_version(empty_path):
    binary = empty_path / "qemu-system-x86_64"
    binary.write_text("#!/bin/sh\necho 'QEMU emulator version 7.2.9 (Debian)'\necho more\n")
    binary.chmod(0o755)
    assert doctor.check_qemu() == Row("QEMU", "ok", f"7.2.9 (Debian) ({binary})")


def test_a_libvirt_that_does_not_answer():
    row = doctor.check_libvirt(SandboxSettings(uri="qemu+tcp://127.0.0.1:1/system"))
    assert row.status == "fail"
    assert "127.0.0.1:1" in row.detail
    assert row.mend


def test_libvirt_python_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "libvirt", None)
    monkeypatch.delitem(sys.modules, "agentvm_kernel.hypervisor.connection", raising=False)
    row = doctor.check_libvirt(SETTINGS)
    assert (row.status, row.mend) == ("fail", "pip install libvirt-python")
    assert doctor.check_qemu_user(SETTINGS).status in ("ok", "warn")


def test_no_kvm_is_a_warning_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(accelerator, "choose", lambda: accelerator.Accelerator("tcg", "software emulation: why"))
    monkeypatch.setattr(accelerator, "KVM_DEVICE", tmp_path / "kvm")
    assert doctor.check_accelerator() == Row("accelerator", "warn", "software emulation: why")


def test_kvm_is_fine(monkeypatch):
    monkeypatch.setattr(accelerator, "choose", lambda: accelerator.Accelerator("kvm", "KVM"))
    assert doctor.check_accelerator().status == "ok"


def test_an_accelerator_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("AGENTVM_ACCEL", "warp")
    assert doctor.check_accelerator().status == "fail"


class FakeHypervisor:
    """A libvirt whose QEMU runs as nobody."""

    dac_user = (65534, 65534)

    def __init__(self, uri):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize(("mode", "status"), [(0o600, "fail"), (0o660, "fail"), (0o666, "ok")])
def test_a_kvm_device_that_qemu_may_not_open(monkeypatch, tmp_path, mode, status):
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(mode)
    monkeypatch.setattr(accelerator, "KVM_DEVICE", device)
    monkeypatch.setattr(accelerator.qemu_user_problem, "__kwdefaults__", {"device": device})
    monkeypatch.setattr("agentvm_kernel.hypervisor.connection.Hypervisor", FakeHypervisor)
    row = doctor.check_qemu_user(SETTINGS)
    assert row.status == status
    assert row.mend == ("" if status == "ok" else f"chgrp kvm {device} && chmod 660 {device}")


def test_without_a_kvm_device_its_mode_is_no_matter(monkeypatch, tmp_path):
    monkeypatch.setattr(accelerator, "KVM_DEVICE", tmp_path / "kvm")
    assert doctor.check_qemu_user(SETTINGS).status == "ok"


def test_without_vsock_virtio_serial_is_used(monkeypatch):
    monkeypatch.setattr("agentvm_kernel.transport.host.vsock_problem", lambda: "/dev/vhost-vsock does not exist")
    row = doctor.check_vsock()
    assert row.status == "warn"
    assert "virtio-serial" in row.detail
    monkeypatch.setattr("agentvm_kernel.transport.host.vsock_problem", lambda: "")
    assert doctor.check_vsock().status == "ok"


@pytest.mark.parametrize(("kind", "status"), [("pass-through", "ok"), ("internal", "warn")])
def test_how_machines_are_frozen_is_tried_and_shown(monkeypatch, kind, status):
    monkeypatch.setattr("agentvm_kernel.hypervisor.connection.Hypervisor", FakeHypervisor)
    monkeypatch.setattr(mechanism, "probe", lambda _: mechanism.Mechanism(kind, "because"))
    row = doctor.check_mechanism(SETTINGS)
    assert (row.status, row.detail.endswith(": because")) == (status, True)
    monkeypatch.setenv(mechanism.VARIABLE, kind)
    monkeypatch.setattr(mechanism, "probe", None)
    row = doctor.check_mechanism(SETTINGS)
    assert (row.status, row.mend) == (status, "" if status == "ok" else "unset AGENTVM_FREEZE")


def test_a_mechanism_that_does_not_exist(monkeypatch):
    monkeypatch.setattr("agentvm_kernel.hypervisor.connection.Hypervisor", FakeHypervisor)
    monkeypatch.setenv(mechanism.VARIABLE, "magic")
    row = doctor.check_mechanism(SETTINGS)
    assert (row.status, row.mend) == ("fail", "unset AGENTVM_FREEZE")


def test_orphans_are_looked_at_here():
    assert doctor.check_orphans().status in ("ok", "warn")


def test_folders_that_can_be_used(tmp_path, monkeypatch):
    if os.geteuid() == 0:
        # pytest's temporary folders are closed to others.
        assert "may not pass through" in doctor.check_folders().detail
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert doctor.check_folders().status == "ok"


def test_a_folder_that_cannot_be_made(monkeypatch):
    monkeypatch.setenv("AGENTVM_CACHE_DIR", "/proc/agentvm")
    row = doctor.check_folders()
    assert row.status == "fail"
    assert "/proc" in row.detail


def test_a_folder_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert doctor.check_folders().status == "fail"


def test_a_disk_that_is_nearly_full(monkeypatch):
    assert doctor.check_space().detail.split()[1] == "GiB"
    monkeypatch.setattr(doctor, "LOW_SPACE_BYTES", 1 << 62)
    assert doctor.check_space().status == "warn"


def test_no_image():
    row = doctor.check_image(SETTINGS)
    assert row.status == "fail"
    assert row.mend.endswith("agentvm image build")


def test_tools_for_images_that_are_missing(empty_path):
    row = doctor.check_build_tools()
    assert row.status == "warn"
    assert row.mend == "apt-get install e2fsprogs mmdebstrap qemu-utils util-linux"


@pytest.fixture
def jupyter(tmp_path, monkeypatch):
    """A Jupyter that knows only the kernels in this folder."""
    monkeypatch.setattr("jupyter_client.kernelspec.jupyter_path", lambda *_: [str(tmp_path / "kernels")])
    monkeypatch.setattr("jupyter_client.kernelspec.jupyter_data_dir", lambda: str(tmp_path))
    return tmp_path / "kernels" / "agentvm"


def test_a_kernelspec_that_is_missing_or_names_a_python_that_is_gone(jupyter):
    assert doctor.check_kernelspec().status == "warn"
    jupyter.mkdir(parents=True)
    (jupyter / "kernel.json").write_text("{")
    assert "does not know" in doctor.check_kernelspec().detail
    for python, status in ((sys.executable, "ok"), ("/no/python", "warn")):
        (jupyter / "kernel.json").write_text(json.dumps({"argv": [python, "-m", "agentvm_kernel"]}))
        row = doctor.check_kernelspec()
        assert row.status == status
        assert python in row.detail or status == "ok"


def test_a_check_that_breaks_is_a_row_too():
    def broken():
        raise RuntimeError("x")

    assert doctor._limited("this", broken) == Row("this", "fail", "the check itself failed, RuntimeError: x")


def test_a_check_that_hangs_does_not_hang_doctor(monkeypatch):
    monkeypatch.setattr(doctor, "CHECK_TIMEOUT_S", 0.01)
    forever = threading.Event()
    row = doctor._limited("libvirt", forever.wait)
    forever.set()
    assert row.status == "fail"
    assert "libvirtd" in row.mend


def test_wrong_settings_are_a_row(monkeypatch):
    monkeypatch.setenv("AGENTVM_BOOT_TIMEOUT", "soon")
    rows = {row.name: row for row in doctor.examine()}
    assert rows["settings"].status == "fail"
    assert "AGENTVM_BOOT_TIMEOUT" in rows["settings"].detail
    assert "guest image" in rows


ROWS = [Row("a", "ok", "fine"), Row("b", "warn", "slow"), Row("c", "fail", "[none]", "apt-get install c")]


def test_the_table_ends_with_the_commands_that_mend(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: ROWS)
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "[none]" in text
    assert text.index("To mend c:\n  apt-get install c\n") > text.index("slow")
    assert text.rstrip().endswith("Machines cannot run on this host yet.")


def test_warnings_are_no_failure(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: ROWS[:2])
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("Machines can run on this host.")


def test_json_for_programs(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: ROWS)
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[2] == {
        "name": "c",
        "status": "fail",
        "detail": "[none]",
        "mend": "apt-get install c",
    }
