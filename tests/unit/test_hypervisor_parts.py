"""The parts of the hypervisor layer that need no libvirt daemon: probing, profiles, names, metadata, qcow2 headers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import libvirt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentvm_kernel.errors import (
    ConfigError,
    HostError,
    IllegalTransition,
    LibvirtError,
    PermissionDeniedError,
    QemuMissingError,
    SnapshotError,
    UnknownMachineError,
    UnreachableError,
)
from agentvm_kernel.hypervisor import accelerator, connection
from agentvm_kernel.hypervisor.files import MachineFiles, write_atomically, write_private
from agentvm_kernel.hypervisor.profiles import PROFILES, get_profile
from agentvm_kernel.hypervisor.qcow2 import backing_file, create_overlay, virtual_size
from agentvm_kernel.hypervisor.states import TRANSITIONS, MachineState
from agentvm_kernel.hypervisor.tags import Owner, Tags


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host with a KVM device and a CPU whose flags the test chooses."""
    monkeypatch.delenv(accelerator.VARIABLE, raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")

    def make(*, flags: str = "fpu vmx sse", device: bool = True) -> dict[str, Path]:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n")
        if device:
            (tmp_path / "kvm").touch()
        return {"device": tmp_path / "kvm", "cpuinfo": tmp_path / "cpuinfo"}

    return make


@pytest.mark.parametrize("extension", ["vmx", "svm"])
def test_kvm_is_taken_where_the_device_opens_and_the_cpu_shows_it(host, extension):
    assert accelerator.choose(**host(flags=f"fpu {extension}")).kind == "kvm"


def test_a_device_that_opens_is_not_enough(host):
    choice = accelerator.choose(**host(flags="fpu hypervisor"))
    assert choice.kind == "tcg"
    assert "neither vmx nor svm" in choice.reason


def test_no_device_means_emulation_and_the_reason_says_so(host):
    choice = accelerator.choose(**host(device=False))
    assert choice.kind == "tcg"
    assert "does not exist" in choice.reason


def test_the_environment_decides_over_the_probe(host, monkeypatch):
    monkeypatch.setenv("AGENTVM_ACCEL", "tcg")
    assert accelerator.choose(**host()).kind == "tcg"
    monkeypatch.setenv("AGENTVM_ACCEL", "kvm")
    assert accelerator.choose(**host(flags="fpu")).kind == "kvm"
    with pytest.raises(HostError, match="does not exist"):
        accelerator.choose(**(host() | {"device": Path("/nonexistent/kvm")}))
    monkeypatch.setenv("AGENTVM_ACCEL", "xen")
    with pytest.raises(ConfigError, match="auto, kvm or tcg"):
        accelerator.choose(**host())


def test_a_kvm_device_that_qemus_user_may_not_open_is_found(host):
    device = host()["device"]
    device.chmod(0o600)
    assert "chmod 0660" in accelerator.qemu_user_problem(64055, 64055, device=device)
    device.chmod(0o666)
    assert accelerator.qemu_user_problem(64055, 64055, device=device) == ""
    assert accelerator.qemu_user_problem(0, 0, device=device) == ""


def test_profiles_grow_and_an_unknown_one_is_an_error_that_names_the_others():
    light, standard, intensive = (get_profile(name) for name in ("light", "standard", "intensive"))
    assert (light.vcpus, light.memory_mib) == (1, 512)
    assert (standard.vcpus, standard.memory_mib) == (2, 1024)
    assert (intensive.vcpus, intensive.memory_mib) == (4, 4096)
    with pytest.raises(ConfigError, match="light, standard, intensive"):
        get_profile("huge")
    assert list(PROFILES) == ["light", "standard", "intensive"]


@pytest.mark.parametrize("name", ["", "../etc", "a/b", ".hidden", "x" * 64, "a b", "näme", "a\n"])
def test_names_that_could_leave_the_folder_are_refused(name):
    with pytest.raises(ConfigError):
        MachineFiles.of(name)


def test_a_run_directory_too_deep_for_sockets_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("AGENTVM_RUN_DIR", str(tmp_path / ("d" * 100)))
    with pytest.raises(ConfigError, match="AGENTVM_RUN_DIR"):
        MachineFiles.of("m")


def test_machine_files_come_and_go(tmp_path, monkeypatch):
    monkeypatch.setenv("AGENTVM_STATE_DIR", str(tmp_path / "s"))
    monkeypatch.setenv("AGENTVM_RUN_DIR", str(tmp_path / "r"))
    files = MachineFiles.of("m")
    files.claim()
    files.prepare((os.geteuid(), os.getegid()), {"owner": {"pid": 1, "start": 2}})
    assert files.owner() == Owner(1, 2)
    assert files.sockets.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ConfigError, match="already"):
        files.claim()
    files.remove()
    files.remove()
    assert not files.folder.exists()
    assert not files.sockets.exists()


def test_private_files_are_private_and_replaced_whole(tmp_path):
    write_private(tmp_path / "secret", b"one")
    write_atomically(tmp_path / "secret", b"two")
    assert (tmp_path / "secret").read_bytes() == b"two"
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_an_owner_is_alive_until_its_process_ends_and_a_namesake_is_not_it():
    assert Owner.current().alive()
    assert not Owner(os.getpid(), Owner.current().start + 1).alive()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stat = Path(f"/proc/{child.pid}/stat").read_text()
    owner = Owner(child.pid, int(stat.rsplit(")", 1)[1].split()[19]))
    assert owner.alive()
    child.kill()
    child.wait()
    assert not owner.alive()


text = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF), max_size=40)


@given(pid=st.integers(1, 2**22), start=st.integers(0, 2**62), lease=text, profile=text)
def test_tags_survive_their_xml(pid, start, lease, profile):
    tags = Tags(owner=Owner(pid, start), folder=Path("/x/<&'\""), lease=lease, profile=profile)
    assert Tags.from_xml(tags.to_xml()) == tags
    assert Tags.from_xml(tags.to_xml(namespaced=False)) == tags


@pytest.mark.parametrize("text", ["", "<x/>", "<machine owner-pid='a' owner-start='1'/>", "no xml"])
def test_foreign_metadata_is_no_machine_of_ours(text):
    with pytest.raises(ValueError, match=r"not the metadata|invalid literal"):
        Tags.from_xml(text)


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")
@pytest.mark.parametrize("size_gib", [0, 1, 40, 1700])
def test_an_overlay_is_what_qemu_img_would_have_made(tmp_path, size_gib):
    base, overlay = tmp_path / "base.qcow2", tmp_path / "over,lay.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "3G"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 5 1G 64k", base], check=True, capture_output=True)
    create_overlay(overlay, base, size=size_gib << 30)
    assert virtual_size(overlay) == max(size_gib, 3) << 30
    assert backing_file(overlay) == base
    assert backing_file(base) is None
    image = f'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{overlay}"}}}}'
    for command in ("read -P 5 1G 64k", "write -P 6 2G 64k", "read -P 6 2G 64k", "read -P 0 0 64k"):
        done = subprocess.run(["qemu-io", "-c", command, image], check=True, capture_output=True, text=True)
        assert "failed" not in done.stdout + done.stderr
    subprocess.run(["qemu-img", "check", "-q", image], check=True)


def test_what_is_no_qcow2_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"hello" * 100)
    with pytest.raises(SnapshotError, match="not a qcow2"):
        create_overlay(tmp_path / "y", tmp_path / "x")
    assert not (tmp_path / "y").exists()


def test_no_state_can_be_left_after_the_end():
    assert all(TRANSITIONS[state] == set() for state in MachineState if state.ended)
    assert set(TRANSITIONS) == set(MachineState)


class FakeError:
    """What `translate` reads of a libvirtError; making a real one needs the failure itself."""

    def __init__(self, code: int, text: str, domain: int = 0) -> None:
        self.code, self.text, self.domain = code, text, domain

    def get_error_code(self) -> int:
        return self.code

    def get_error_domain(self) -> int:
        return self.domain

    def __str__(self) -> str:
        return self.text


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (libvirt.VIR_ERR_NO_DOMAIN, "knows no such machine", UnknownMachineError),
        (libvirt.VIR_ERR_AUTH_UNAVAILABLE, "authentication unavailable", PermissionDeniedError),
        (libvirt.VIR_ERR_SYSTEM_ERROR, "Failed to connect socket to '/x': Permission denied", PermissionDeniedError),
        (libvirt.VIR_ERR_SYSTEM_ERROR, "Failed to connect socket to '/x': No such file or directory", UnreachableError),
        (libvirt.VIR_ERR_INTERNAL_ERROR, "client socket is closed", UnreachableError),
        (libvirt.VIR_ERR_INVALID_ARG, "could not find capabilities for arch=x86_64", QemuMissingError),
        (libvirt.VIR_ERR_OPERATION_INVALID, "domain is not running", IllegalTransition),
        (libvirt.VIR_ERR_INTERNAL_ERROR, "something else", LibvirtError),
    ],
)
def test_each_error_of_libvirt_has_its_type_and_says_what_failed(code, text, kind):
    error = connection.translate(FakeError(code, text), "starting machine m", "qemu:///x")
    assert type(error) is kind
    assert text in str(error)


def test_the_uri_is_what_the_user_set_else_what_fits_the_user(monkeypatch):
    monkeypatch.delenv("AGENTVM_URI", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert connection.default_uri() == "qemu:///system"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert connection.default_uri() == "qemu:///session"
    monkeypatch.setenv("AGENTVM_URI", "qemu:///embed?root=/tmp/x")
    assert connection.default_uri() == "qemu:///embed?root=/tmp/x"


def test_an_unreachable_libvirt_is_a_typed_error_with_a_hint_and_prints_nothing(capfd, tmp_path):
    hypervisor = connection.Hypervisor(f"qemu+unix:///system?socket={tmp_path}/none")
    with pytest.raises(UnreachableError, match="Is libvirtd running"), hypervisor:
        pass
    assert capfd.readouterr() == ("", "")


def test_a_closed_connection_stays_closed():
    hypervisor = connection.Hypervisor("test:///default")
    hypervisor.close()
    with pytest.raises(UnreachableError, match="was closed"):
        hypervisor.domains()


def test_another_kind_of_hypervisor_is_refused():
    with pytest.raises(HostError, match="manages TEST and not QEMU"), connection.Hypervisor("test:///default"):
        pass


@pytest.mark.parametrize(
    ("model", "user"),
    [("<model>dac</model><baselabel type='kvm'>+64055:+107</baselabel>", (64055, 107)), ("<model>none</model>", None)],
)
def test_qemus_user_is_read_off_the_capabilities(model, user):
    xml = f"<capabilities><host><secmodel>{model}</secmodel></host></capabilities>"
    assert connection._parse_qemu_user(xml) == user


def test_the_hot_path_imports_nothing_heavy():
    code = (
        "import sys; import agentvm_kernel.hypervisor.machine, agentvm_kernel.hypervisor.connection;"
        "heavy = {'pydantic', 'structlog', 'jupyter_client', 'numpy', 'tornado', 'traitlets'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
