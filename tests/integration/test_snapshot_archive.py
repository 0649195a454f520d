"""Snapshots as files, with the toy guest: a round trip, and what somebody who means harm may put into one."""

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from toy_guest import counter, wait_until_counting

from agentvm_kernel import cli
from agentvm_kernel.errors import AgentVMError, SnapshotError, SnapshotMismatchError
from agentvm_kernel.hypervisor import archive
from agentvm_kernel.hypervisor.boot import boot_machine
from agentvm_kernel.hypervisor.freeze import freeze_live, freeze_template
from agentvm_kernel.hypervisor.garbage import delete
from agentvm_kernel.hypervisor.snapshot import layers_dir, list_all, snapshots_dir
from agentvm_kernel.hypervisor.thaw import thaw

pytestmark = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="needs QEMU")

Members = dict[str, bytes]


def anything(name: str) -> None:
    """A check of names that takes all."""


@pytest.fixture
def exported(hypervisor, toy, tmp_path, monkeypatch):
    """An exported file, and what the toy counter stood at."""
    image = toy()
    monkeypatch.setattr(archive.store, "with_digest", lambda digest: image if digest == image.digest else None)
    machine = boot_machine(hypervisor, image, "light", template=True)
    try:
        wait_until_counting(machine)
        template = freeze_template(machine)
    finally:
        machine.destroy()
    machine = thaw(hypervisor, template)
    machine.resume()
    frozen = freeze_live(machine, name="travels", description="far", session="s")
    machine.destroy()
    again = thaw(hypervisor, frozen)
    value = counter(again)
    again.destroy()
    path = tmp_path / "travels.avm"
    assert archive.write(hypervisor, frozen, path) == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600
    yield path, value
    for one in reversed(list_all()):
        delete(one)
    shutil.rmtree(layers_dir())


def unpack(path: Path) -> Members:
    data = subprocess.run(["zstd", "-dc", path], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as members:
        return {one.name: members.extractfile(one).read() for one in members}


def pack(path: Path, members: Members, *, honest: bool = True, kinds: dict[str, bytes] | None = None) -> Path:
    """Write an archive; `honest` has the manifest tell the truth about its members."""
    if honest:
        manifest = json.loads(members["manifest.json"])
        manifest["members"] = {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in members.items()
        }
        members = members | {"manifest.json": json.dumps(manifest).encode()}
    with gzip.open(path, "wb", compresslevel=1) as out, tarfile.open(fileobj=out, mode="w|") as files:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.type = (kinds or {}).get(name, tarfile.REGTYPE)
            info.size = len(data) if info.type == tarfile.REGTYPE else 0
            info.linkname = "/etc/passwd"
            files.addfile(info, io.BytesIO(data))
    return path


def told(members: Members, **changes: object) -> Members:
    """Change the snapshot that the manifest tells of."""
    manifest = json.loads(members["manifest.json"])
    manifest["snapshot"] |= changes
    return members | {"manifest.json": json.dumps(manifest).encode()}


def test_a_snapshot_travels_in_a_file(exported, hypervisor, tmp_path):
    path, value = exported
    for one in reversed(list_all()):
        delete(one)
    refused = []
    with pytest.raises(SnapshotError, match="taken"):
        archive.read(hypervisor, path, check_name=lambda name: refused.append(name) or _taken())
    assert refused == ["travels"]
    assert list_all() == []
    added = archive.read(hypervisor, path, check_name=anything)
    assert (added.name, added.description, added.exported, added.session, added.parent) == (
        *("travels", "far", True),
        *("", ""),
    )
    machine = thaw(hypervisor, added)
    assert counter(machine) == value
    further = freeze_live(machine, session="other", after=added.id)
    assert (further.parent, further.after) == (added.id, added.id)
    machine.destroy()
    # Without zstd it is compressed by gzip, which is told apart by its first bytes.
    second = archive.read(hypervisor, pack(tmp_path / "gz", unpack(path)), check_name=anything, name="another")
    assert second.name == "another"
    assert second.id != added.id


def _taken() -> None:
    raise SnapshotError("The name is taken.")


def test_hazard_12_nothing_that_a_file_says_is_believed(exported, hypervisor, tmp_path):
    path, _ = exported
    whole = unpack(path)
    before = list_all()
    layers = set(layers_dir().iterdir())
    xml = whole["domain.xml"]
    qcow2 = bytearray(whole["disk.qcow2"])
    data_file = bytes(qcow2[:72]) + (4).to_bytes(8, "big") + bytes(qcow2[80:])
    grown = bytes(qcow2[:24]) + (1 << 40).to_bytes(8, "big") + bytes(qcow2[32:])
    host_disk = b"<disk type='block' device='disk'><source dev='/dev/vda'/><target dev='vdb'/></disk>"
    without = {name: data for name, data in whole.items() if name != "state"}
    hardware = json.loads(whole["manifest.json"])["snapshot"]["hardware"]
    bad: dict[str, Path] = {
        "not a file": tmp_path / "none",
        "empty": tmp_path / "empty",
        "garbage": tmp_path / "garbage",
        "cut": tmp_path / "cut",
        "digest": pack(tmp_path / "1", whole | {"state": whole["state"][:-1] + b"x"}, honest=False),
        "size": pack(tmp_path / "2", whole | {"secret": bytes(2000)}),
        "traversal": pack(tmp_path / "3", {("../../evil" if n == "state" else n): d for n, d in whole.items()}),
        "link": pack(tmp_path / "4", whole, kinds={"state": tarfile.SYMTYPE}),
        "device": pack(tmp_path / "5", whole, kinds={"memory": tarfile.CHRTYPE}),
        "extra": pack(tmp_path / "6", whole | {"evil": b"x"}),
        "missing": pack(tmp_path / "7", without),
        "id": pack(tmp_path / "8", told(whole, id="../../../etc")),
        "kind": pack(tmp_path / "9", told(whole, name=["x"])),
        "memory": pack(tmp_path / "10", told(whole, hardware=hardware | {"memory_mib": 1 << 20})),
        "types": pack(tmp_path / "11", told(whole, hardware=hardware | {"disk_gib": "1"})),
        "image": pack(tmp_path / "12", told(whole, hardware=hardware | {"image": "f" * 64})),
        "cpu": pack(tmp_path / "13", told(whole, cpu="Z80")),
        "runtime": pack(tmp_path / "14", told(whole, hardware=hardware | {"runtime": "another"})),
        "host disk": pack(tmp_path / "15", whole | {"domain.xml": xml.replace(b"</devices>", host_disk + b"</devices>")}),
        "no xml": pack(tmp_path / "16", whole | {"domain.xml": b"<domain"}),
        "data file": pack(tmp_path / "17", whole | {"disk.qcow2": data_file}),
        "disk size": pack(tmp_path / "18", whole | {"disk.qcow2": grown}),
        "raw disk": pack(tmp_path / "19", whole | {"disk.qcow2": b"x" * 70000}),
        "pages": pack(tmp_path / "20", whole | {"memory": whole["memory"][:-1]}),
        "runs": pack(tmp_path / "21", whole | {"memory": _delta_beyond_the_end()}),
        "format": pack(tmp_path / "22", whole | {"manifest.json": whole["manifest.json"].replace(b"shot/1", b"shot/9")}),
    }  # fmt: skip
    bad["empty"].touch()
    bad["garbage"].write_bytes(b"\x28\xb5\x2f\xfd" + b"garbage" * 100)
    bad["cut"].write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for what, file in bad.items():
        with pytest.raises(AgentVMError) as error:
            archive.read(hypervisor, file, check_name=anything)
        assert str(file) in str(error.value) or isinstance(error.value, SnapshotMismatchError | SnapshotError), what
        assert list_all() == before, what
        assert set(layers_dir().iterdir()) == layers, what
        assert not list(snapshots_dir().glob(".partial-*")), what
    assert not (tmp_path.parent / "evil").exists()


def _delta_beyond_the_end() -> bytes:
    return (
        b"AVMDELT1"
        + (1).to_bytes(8, "little")
        + (1 << 40).to_bytes(8, "little")
        + (1).to_bytes(8, "little")
        + bytes(4096)
    )


def test_the_command_line_exports_imports_lists_and_deletes(exported, tmp_path, capsys):
    target = tmp_path / "again.avm"

    def run(*arguments: str) -> str:
        code = cli.main(["snapshot", *arguments])
        shown = capsys.readouterr()
        return shown.out if code == 0 else shown.err

    exported_id = next(one.id for one in list_all() if one.name == "travels")
    assert "travels is kept" in run("export", "travels", "-o", str(target))
    assert target.stat().st_size > 10_000
    assert "already" in run("import", str(target))
    assert "no name for a snapshot" in run("import", str(target), "--name", "../x")
    added = json.loads(run("import", str(target), "--name", "second", "--json"))
    assert (added["name"], added["exported"], added["profile"]) == ("second", True, "light")
    listed = json.loads(run("list", "--json"))
    assert {one["name"]: one["id"] for one in listed} == {"travels": exported_id, "second": added["id"]}
    assert {line.split()[0] for line in run("list").splitlines()} == {"travels", "second"}
    assert "no snapshot 'third'" in run("delete", "second", "third")
    assert "Deleted second." in run("delete", "second")
    assert json.loads(run("delete", "travels", "--json")) == [exported_id]
    assert "There are no snapshots" in run("list")
    assert "no snapshot 'travels'" in run("restore", "travels")
    assert json.loads(run("list", "--json")) == []


def test_what_cannot_be_written_leaves_nothing(exported, hypervisor, tmp_path, monkeypatch):
    frozen = next(one for one in list_all() if one.name == "travels")
    with pytest.raises(AgentVMError, match="could not be written"):
        archive.write(hypervisor, frozen, tmp_path / "no" / "folder")
    with pytest.raises(SnapshotMismatchError, match="guest image ffffffffffff, which is not here"):
        archive.write(hypervisor, replace(frozen, hardware=replace(frozen.hardware, image="f" * 64)), tmp_path / "x")
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert archive.write(hypervisor, frozen, tmp_path / "gz") > 0
    assert (tmp_path / "gz").read_bytes()[:2] == b"\x1f\x8b"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gz", "travels.avm"]
    assert not list(snapshots_dir().glob(".partial-*"))
