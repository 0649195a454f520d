"""The domain XML: valid by libvirt's own schema for every combination, and proof against hostile values."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree
from pydantic import ValidationError

from agentvm_kernel.hypervisor.domain_xml import MEMORY_ID, DomainSpec, build, memory_arguments
from agentvm_kernel.hypervisor.profiles import PROFILES
from agentvm_kernel.hypervisor.tags import Owner, Tags


def schema_path() -> Path | None:
    """Where this system's libvirt keeps its RELAX NG schemas."""
    bases = ["/usr/share", "/usr/local/share", sys.prefix + "/share", *os.environ.get("XDG_DATA_DIRS", "").split(":")]
    if pkg_config := shutil.which("pkg-config"):
        asked = subprocess.run(
            [pkg_config, "--variable=datadir", "libvirt"], capture_output=True, text=True, check=False
        )
        bases.insert(0, asked.stdout.strip())
    found = (Path(base) / "libvirt/schemas/domain.rng" for base in bases if base)
    return next((path for path in found if path.exists()), None)


SCHEMA = schema_path()


def spec(**changes) -> DomainSpec:
    values = {
        "name": "m1",
        "uuid": uuid4(),
        "genid": uuid4(),
        "profile": PROFILES["standard"],
        "accelerator": "tcg",
        "kernel": Path("/i/vmlinuz"),
        "initrd": Path("/m/initrd"),
        "disk": Path("/m/overlay.qcow2"),
        "serial_log": Path("/m/serial.log"),
        "guest_socket": Path("/run/m/guest"),
        "pid_file": Path("/run/m/pid"),
        "tags": Tags(owner=Owner(1, 2), folder=Path("/m")),
    }
    return DomainSpec(**(values | changes))


@pytest.mark.skipif(SCHEMA is None, reason="libvirt's schemas are not installed")
def test_every_profile_and_option_is_valid_by_libvirts_schema():
    schema = etree.RelaxNG(etree.parse(str(SCHEMA)))
    options = itertools.product(
        PROFILES.values(),
        ("kvm", "tcg"),
        (Path("/run/m/guest"), None),
        (None, Path("/m/memory")),
        (None, (64055, 64055)),
    )
    for profile, kind, socket, memory, user in options:
        text = build(spec(profile=profile, accelerator=kind, guest_socket=socket, memory_file=memory, qemu_user=user))
        assert schema.validate(etree.fromstring(text)), f"{schema.error_log}\n{text}"


def test_nothing_is_there_that_widens_the_attack_surface_or_breaks_clones():
    devices = ElementTree.fromstring(build(spec())).find("devices")
    kinds = {device.tag for device in devices}
    assert not kinds & {"graphics", "video", "sound", "interface", "hostdev", "redirdev", "filesystem"}
    assert devices.find("memballoon").get("model") == "none"
    assert devices.find("controller[@type='usb']").get("model") == "none"


def test_a_machine_with_vsock_has_no_serial_port_and_the_other_way_round():
    with_port, with_vsock = (ElementTree.fromstring(build(spec(guest_socket=path))) for path in (Path("/s"), None))
    assert with_port.find("./devices/channel/target").get("name") == "org.agentvm.0"
    assert with_port.find("./devices/vsock") is None
    assert with_vsock.find("./devices/vsock/cid").get("auto") == "yes"
    assert with_vsock.find("./devices/channel") is None


def test_a_guest_that_crashes_or_reboots_ends():
    domain = ElementTree.fromstring(build(spec()))
    assert [domain.findtext(tag) for tag in ("on_poweroff", "on_reboot", "on_crash")] == ["destroy"] * 3


def test_shared_disk_layers_keep_their_owner():
    label = ElementTree.fromstring(build(spec(qemu_user=(64055, 107)))).find("seclabel")
    assert label.get("relabel") == "no"
    assert label.findtext("label") == "+64055:+107"


@given(st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF), min_size=1, max_size=60))
def test_no_path_can_add_markup_or_options(part):
    path = Path("/x") / part.replace("/", "_")
    domain = ElementTree.fromstring(build(spec(disk=path, memory_file=path)))
    assert domain.find("./devices/disk/source").get("file") == str(path)
    arguments = [arg.get("value") for arg in domain.iter("{http://libvirt.org/schemas/domain/qemu/1.0}arg")]
    assert json.loads(arguments[arguments.index("-object") + 1])["mem-path"] == str(path)
    assert arguments[-2:] == ["-machine", f"memory-backend={MEMORY_ID}"]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a b"},
        {"name": "<x/>"},
        {"disk": Path("relative")},
        {"disk": Path("/x\ny")},
        {"cmdline": "a\nb"},
        {"accelerator": "xen"},
        {"unknown": 1},
    ],
)
def test_bad_values_are_refused(change):
    with pytest.raises(ValidationError):
        spec(**change)


def test_private_memory_is_opened_read_only_where_qemu_can():
    old = json.loads(memory_arguments(Path("/m"), 512, shared=False)[1])
    new = json.loads(memory_arguments(Path("/m"), 512, shared=False, read_only=True)[1])
    assert (old["share"], old["size"]) == (False, 512 << 20)
    assert "readonly" not in old
    assert (new["readonly"], new["rom"]) == (True, "off")
