"""Snapshots as files: one compressed tar archive that holds all of a machine but its guest image.

    manifest.json   {"format", "snapshot", "members": {name: {"size", "sha256"}}}; always first
    state           the devices' state
    memory          all pages that are not zero, as a delta (see `pages`)
    disk.qcow2      what differs from the image's disk
    domain.xml      the machine's domain XML, to compare with
    secret          what its runtime and the host share

Whoever made the file is not trusted: only these members are taken, under names of our own, up to the sizes that the machine's profile
allows; the domain XML is written anew here and only compared; of the disk, nothing but clusters and our own image's path is kept. What runs
in the machine is the maker's affair, as in any machine. Compressed by the tool `zstd`, or by gzip where that is missing.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import uuid
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from agentvm_kernel.errors import HostError, SnapshotError, SnapshotMismatchError
from agentvm_kernel.hypervisor import pages
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import write_private
from agentvm_kernel.hypervisor.freeze import MAX_STATE, generalise, to_disk
from agentvm_kernel.hypervisor.memory import content_digest, memory_mode, seal, sources, stamp
from agentvm_kernel.hypervisor.qcow2 import is_plain, virtual_size
from agentvm_kernel.hypervisor.snapshot import (
    Snapshot,
    being_made,
    differences,
    layer_path,
    new_id,
    require_thawable,
    snapshots_dir,
)
from agentvm_kernel.image import store
from agentvm_kernel.image.store import Image

FORMAT = "agentvm-snapshot/1"
MANIFEST = "manifest.json"
MEMBERS = ("state", "memory", "disk.qcow2", "domain.xml", "secret")
MAX_SMALL = 1 << 20
CHUNK = 1 << 20
_ZSTD, _GZIP = b"\x28\xb5\x2f\xfd", b"\x1f\x8b"


def write(hypervisor: Hypervisor, snapshot: Snapshot, path: Path) -> int:
    """Write a snapshot to a file that only its owner may read, and return the file's size in bytes.

    Args:
        hypervisor: of this host.
        snapshot: what to write.
        path: of the file; replaced where it exists.

    Raises:
        SnapshotMismatchError: files of the snapshot changed since it was frozen.
        SnapshotError: it is an internal one (see `internal`).
        HostError: the disk is full, or a tool is missing.
    """
    if snapshot.internal:
        raise SnapshotError(
            f"Snapshot {snapshot.name or snapshot.id} lies inside its disk image, which cannot be written to a file.",
            hint="Only snapshots made by pass-through to QEMU can; `agentvm doctor` says why this host makes others.",
        )
    image = _image(snapshot)
    base, above = sources(hypervisor, snapshot)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-export-", dir=snapshots_dir()) as scratch:
            folder = Path(scratch)
            pages.write_whole(folder / "base", base.memory)
            pages.merge(folder / "memory", [*(one.delta for one in above), folder / "base"], snapshot.memory_pages)
            flattening = ("-U", "-f", "qcow2", "-O", "qcow2", "-B", image.disk, "-F", "qcow2")
            _qemu_img("convert", *flattening, snapshot.disk, folder / "disk.qcow2")
            where = {"memory": folder / "memory", "disk.qcow2": folder / "disk.qcow2"}
            where |= {name: snapshot.folder / name for name in ("state", "domain.xml", "secret")}
            members = {name: {"size": where[name].stat().st_size, "sha256": _sha256(where[name])} for name in MEMBERS}
            manifest = {"format": FORMAT, "snapshot": asdict(snapshot), "members": members}
            write_private(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
            where[MANIFEST] = folder / MANIFEST
            with (
                _compressor(partial) as out,
                tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive,
            ):
                for name in (MANIFEST, *MEMBERS):
                    archive.add(where[name], arcname=name, filter=_anonymous)
        partial.replace(path)
    except OSError as error:
        raise HostError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


def read(hypervisor: Hypervisor, path: Path, *, check_name: Callable[[str], None], name: str | None = None) -> Snapshot:
    """Check a file that `write` wrote, add its snapshot as an exported one and return it.

    Args:
        hypervisor: of this host.
        path: of the file.
        check_name: raises an error where the snapshot cannot have its name here.
        name: of the snapshot; None takes the one in the file.

    Raises:
        SnapshotMismatchError: it does not fit this host; the message lists what differs.
        SnapshotError: it is no such file, or is damaged. Nothing is left of it.
        HostError: the disk is full, or a tool is missing.
    """
    layer, snapshot_id = new_id(), new_id()
    try:
        with _decompressor(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            members = iter(archive)
            manifest = _manifest(archive, members)
            told = _snapshot(manifest, name)
            check_name(told.name)
            image = _image(told)
            if found := [text for text in differences(hypervisor, told) if "layer" not in text]:
                raise SnapshotMismatchError(f"{path} does not fit this host: {'; '.join(found)}.")
            limits = _limits(told)
            with being_made(snapshot_id) as folder:
                for member_name in MEMBERS:
                    _extract(archive, next(members, None), member_name, folder, manifest["members"], limits)
                if next(members, None) is not None:
                    raise SnapshotError(f"{path} has more in it than a snapshot.")
                try:
                    return _add(hypervisor, folder, replace(told, id=snapshot_id, layer=layer), image)
                except BaseException:
                    layer_path(layer).unlink(missing_ok=True)
                    raise
    except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError) as error:
        raise SnapshotError(f"{path} is no snapshot, or is damaged: {error}.") from error
    except OSError as error:
        raise HostError(f"{path} could not be read: {error.strerror or error}.") from error


def _manifest(archive: tarfile.TarFile, members: Iterator[tarfile.TarInfo]) -> dict[str, Any]:
    first = next(members, None)
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > MAX_SMALL:
        raise ValueError("it does not begin with a manifest")
    source = archive.extractfile(first)
    manifest = json.loads(source.read(MAX_SMALL)) if source is not None else None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    if not isinstance(manifest.get("members"), dict):
        raise ValueError("its manifest lists no members")
    return manifest


def _snapshot(manifest: dict[str, Any], name: str | None) -> Snapshot:
    """Return the metadata that the manifest tells, without what only meant something where it was written."""
    from agentvm_kernel.hypervisor.profiles import get_profile

    told = Snapshot.from_json(json.dumps(manifest["snapshot"]).encode())
    hardware = told.hardware
    for field, kind in (("profile", str), ("memory_mib", int), ("vcpus", int), ("disk_gib", int), ("image", str)):
        if type(getattr(hardware, field)) is not kind:
            raise ValueError(f"{field} is of a wrong kind")
    profile = get_profile(hardware.profile)
    if (hardware.memory_mib, hardware.vcpus) != (profile.memory_mib, profile.vcpus):
        raise SnapshotMismatchError(
            f"The machine had {hardware.memory_mib} MiB and {hardware.vcpus} CPUs, but profile {profile.name} here "
            f"has {profile.memory_mib} MiB and {profile.vcpus}."
        )
    if not 0 < hardware.disk_gib <= 1024:
        raise ValueError("its disk has no size")
    return replace(
        told,
        name=told.name if name is None else name,
        parent="",
        after="",
        session="",
        automatic=False,
        exported=True,
        owner_pid=0,
        owner_start=0,
        pages=0,
        digests={},
    )


def _limits(snapshot: Snapshot) -> dict[str, int]:
    memory = snapshot.hardware.memory_mib << 20
    disk = snapshot.hardware.disk_gib << 30
    return {
        "state": MAX_STATE,
        "memory": memory + memory // 64 + MAX_SMALL,
        "disk.qcow2": disk + disk // 64 + MAX_SMALL,
        "domain.xml": MAX_SMALL,
        "secret": 1024,
    }


def _extract(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo | None,
    name: str,
    folder: Path,
    promised: dict[str, Any],
    limits: dict[str, int],
) -> None:
    """Write one member to a file of our own; the path in the archive is only compared."""
    source = archive.extractfile(member) if member is not None and member.isreg() and member.name == name else None
    if member is None or source is None:
        raise ValueError(f"{name} is missing")
    size, wanted = promised[name]["size"], promised[name]["sha256"]
    if type(size) is not int or member.size != size or not 0 < size <= limits[name]:
        raise ValueError(f"{name} has a size that it cannot have")
    if shutil.disk_usage(folder).free < size + (256 << 20):
        raise HostError(f"{name} needs {size >> 20} MiB, and the disk has no room for it.")
    digest = hashlib.sha256()
    target = folder / name
    write_private(target, b"")
    with open(target, "wb") as out:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            out.write(chunk)
    if digest.hexdigest() != wanted:
        raise ValueError(f"{name} is not what its digest says")


def _add(hypervisor: Hypervisor, folder: Path, snapshot: Snapshot, image: Image) -> Snapshot:
    """Make a snapshot of the members in `folder`."""
    # The disk: its header may name files of the host, so it is checked, and then names our image.
    disk = folder / "disk.qcow2"
    if not is_plain(disk) or virtual_size(disk) != snapshot.hardware.disk_gib << 30:
        raise SnapshotError("The disk in the file is not one that agentvm wrote.")
    _qemu_img("rebase", "-u", "-f", "qcow2", "-b", image.disk, "-F", "qcow2", disk)
    target = layer_path(snapshot.layer)
    disk.rename(target)
    seal(hypervisor, target, 0o444)
    # The memory.
    packed, memory = folder / "memory", folder / "memory.whole"
    write_private(memory, b"")
    os.truncate(memory, snapshot.hardware.memory_mib << 20)
    pages.apply_deltas([packed], memory)
    memory.replace(packed)
    seal(hypervisor, packed, memory_mode(hypervisor))
    # The devices: QEMU is started with ours, which must be the same.
    ours = _domain_xml(hypervisor, snapshot, image)
    if _shape(ours) != _shape((folder / "domain.xml").read_bytes()):
        raise SnapshotMismatchError("The machine in the file has other devices than machines here have.")
    write_private(folder / "domain.xml", ours, mode=0o400)
    for name in ("state", "secret"):
        (folder / name).chmod(0o400)
    digests = {name: content_digest(folder / name) for name in ("state", "memory")}
    snapshot = replace(snapshot, digests=digests)
    write_private(folder / "snapshot.json", snapshot.to_json())
    stamp(folder)
    require_thawable(hypervisor, snapshot)
    to_disk(snapshot, folder)
    return snapshot


def _domain_xml(hypervisor: Hypervisor, snapshot: Snapshot, image: Image) -> bytes:
    """Return the generalised domain XML of a machine with this hardware, as libvirt completes it."""
    import libvirt

    from agentvm_kernel.hypervisor.domain_xml import DomainSpec, build
    from agentvm_kernel.hypervisor.files import MachineFiles
    from agentvm_kernel.hypervisor.machine import new_name
    from agentvm_kernel.hypervisor.profiles import get_profile
    from agentvm_kernel.hypervisor.tags import Owner, Tags

    files = MachineFiles.of(new_name())
    hardware = snapshot.hardware
    spec = DomainSpec(
        name=files.name,
        uuid=uuid.uuid4(),
        genid=uuid.uuid4(),
        profile=get_profile(hardware.profile),
        accelerator="kvm" if hardware.accelerator == "kvm" else "tcg",
        kernel=image.kernel,
        initrd=files.initrd,
        disk=files.overlay,
        serial_log=files.serial_log,
        guest_socket=None if hardware.vsock else files.guest_socket,
        pid_file=files.pid_file,
        tags=Tags(owner=Owner.current(), folder=files.folder),
    )
    with hypervisor.errors("comparing the devices of a machine"):
        domain = hypervisor.connection().defineXML(build(spec))
        try:
            xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        finally:
            domain.undefine()
    element = ElementTree.fromstring(xml)  # noqa: S314 (libvirt's own words)
    generalise(element)
    return ElementTree.tostring(element)


def _shape(xml: bytes) -> str:
    """Return a domain XML without names and paths, in a form to compare."""
    try:
        domain = ElementTree.fromstring(xml)  # noqa: S314 (expat of Python 3.11 limits entities; the size is bounded)
    except ElementTree.ParseError as error:
        raise SnapshotError(f"The domain XML in the file is damaged: {error}.") from error
    for tag in ("name", "uuid", "genid"):
        for element in domain.findall(tag):
            domain.remove(element)
    for device in domain.iterfind("./devices/*"):
        for alias in device.findall("alias"):  # libvirt gives these when a machine starts
            device.remove(alias)
    for source in domain.iterfind("./devices/*/source"):
        for attribute in ("file", "path", "index"):
            source.attrib.pop(attribute, None)
    for cid in domain.iterfind("./devices/vsock/cid"):
        cid.attrib.clear()
    for console in domain.iterfind("./devices/console"):
        console.attrib.pop("tty", None)
    return ElementTree.canonicalize(ElementTree.tostring(domain, encoding="unicode"), strip_text=True)


def _image(snapshot: Snapshot) -> Image:
    image = store.with_digest(snapshot.hardware.image)
    if image is None:
        raise SnapshotMismatchError(
            f"Snapshot {snapshot.name or snapshot.id} rests on the guest image {snapshot.hardware.image[:12]}, which is not here.",
            hint="Build the same image first: agentvm image build.",
        )
    return image


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o600
    return member


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _qemu_img(*arguments: str | Path) -> None:
    try:
        done = subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise HostError(
            "There is no qemu-img here.", hint="Install it, on Debian with: apt install qemu-utils"
        ) from error
    if done.returncode:
        raise SnapshotError(f"qemu-img {arguments[0]} failed: {done.stderr.strip()[-500:]}")


@contextlib.contextmanager
def _compressor(path: Path) -> Iterator[BinaryIO]:
    """Give a stream to write to; what is written goes to `path` compressed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as out:
        if (tool := shutil.which("zstd")) is None:
            import gzip

            with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=3) as packed:
                yield cast(BinaryIO, packed)
            return
        with subprocess.Popen([tool, "-q", "-3", "-T0", "-c"], stdin=subprocess.PIPE, stdout=out) as process:
            assert process.stdin is not None  # noqa: S101 (we asked for it)
            yield cast(BinaryIO, process.stdin)
            process.stdin.close()
        if process.returncode:
            raise HostError(f"{path} could not be written: zstd failed (exit code {process.returncode}).")


@contextlib.contextmanager
def _decompressor(path: Path) -> Iterator[BinaryIO]:
    """Give a stream to read the decompressed content of `path` from."""
    with open(path, "rb", buffering=0) as source:
        magic = source.read(4)
        source.seek(0)
        if magic.startswith(_GZIP):
            import gzip

            with gzip.GzipFile(fileobj=source) as unpacked:
                yield cast(BinaryIO, unpacked)
            return
        if magic != _ZSTD:
            raise SnapshotError(f"{path} is not a file that `agentvm snapshot export` wrote.")
        if (tool := shutil.which("zstd")) is None:
            raise HostError(f"{path} was compressed by zstd, which is not here.", hint="Install zstd.")
        process = subprocess.Popen(
            [tool, "-q", "-d", "-c"], stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None  # noqa: S101 (we asked for it)
        try:
            yield cast(BinaryIO, process.stdout)
        finally:
            process.stdout.close()
            process.kill()
            process.wait()
