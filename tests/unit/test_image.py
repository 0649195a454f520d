"""Image specs, digests, and the initramfs, without building anything."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentvm_kernel.errors import ImageError
from agentvm_kernel.image import initramfs, store
from agentvm_kernel.image.build import build_image, image_digest
from agentvm_kernel.image.spec import ImageSpec, load_spec


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTVM_CACHE_DIR", str(tmp_path / "cache"))


def test_the_default_spec_is_shipped_and_valid() -> None:
    spec = load_spec()
    assert spec.name == "default"
    assert "pandas" in spec.preload


def test_the_digest_depends_on_the_spec_and_on_nothing_else() -> None:
    spec = load_spec()
    assert image_digest(spec) == image_digest(load_spec())
    assert image_digest(spec) != image_digest(spec.model_copy(update={"disk_gib": 9}))


@pytest.mark.parametrize(
    "line",
    [
        'name = "../../etc"',
        'name = "a/b"',
        'name = "a"\npackages = ["--option"]',
        'name = "a"\npackages = ["x;reboot"]',
        'name = "a"\nrequirements = ["-r /etc/passwd"]',
        'name = "a"\nrequirements = ["git+https://example.org/x"]',
        'name = "a"\nrequirements = ["/tmp/x.whl"]',
        'name = "a"\npreload = ["os; import evil"]',
        'name = "a"\nunknown = 1',
        'name = "a"\ndisk_gib = 0',
        "name = 1",
        "nonsense",
        'name = "a"\nrequirements = ["numpy; python_version > \'3\'"]',
        'name = "a"\nsuite = "-x"',
        'name = "a\\n"',
        'name = "a"\nkernel = "../../x"',
    ],
)
def test_a_hostile_or_wrong_spec_is_refused_with_its_name(tmp_path: Path, line: str) -> None:
    path = tmp_path / "spec.toml"
    path.write_text(line)
    with pytest.raises(ImageError, match=r"spec\.toml is not valid"):
        load_spec(path)


def test_a_spec_that_is_not_there_names_the_shipped_ones() -> None:
    with pytest.raises(ImageError, match="default"):
        load_spec("no-such-spec")


@settings(deadline=None)  # every example starts a process
@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z]{1,20}", fullmatch=True), st.binary(max_size=300)),
        max_size=8,
        unique_by=lambda e: e[0],
    )
)
def test_cpio_reads_what_we_write(entries: list[tuple[str, bytes]]) -> None:
    archive = initramfs.cpio([(name, 0o100644, data) for name, data in entries])
    names = (
        subprocess.run(["cpio", "--quiet", "-t"], input=archive, capture_output=True, check=True)
        .stdout.decode()
        .split()
    )
    assert names == [name for name, _ in entries]


def test_cpio_keeps_modes_and_contents(tmp_path: Path) -> None:
    archive = initramfs.cpio([("d", 0o40755, b""), ("d/f", 0o100600, b"contents"), ("l", 0o120777, b"d/f")])
    subprocess.run(["cpio", "--quiet", "-i", "-d"], input=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "d/f").read_bytes() == b"contents"
    assert (tmp_path / "d/f").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "l").readlink() == Path("d/f")


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text(
        "k/virtio_pci.ko: k/virtio_ring.ko k/virtio.ko\nk/virtio.ko:\nk/virtio_ring.ko: k/virtio.ko\n"
        "k/virtio_blk.ko: k/virtio.ko\nk/virtio_console.ko: k/virtio.ko\nk/virtio-rng.ko: k/virtio.ko\n"
        "k/vsock.ko:\nk/vmw_vsock_virtio_transport.ko: k/vsock.ko\nk/virtio_net.ko:\n"
    )
    (tmp_path / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    order = initramfs.module_order(tmp_path)
    assert order.index("k/virtio.ko") < order.index("k/virtio_ring.ko") < order.index("k/virtio_pci.ko")
    assert order.index("k/vsock.ko") < order.index("k/vmw_vsock_virtio_transport.ko")
    assert len(order) == len(set(order))


def test_soft_dependencies_are_loaded_first_by_name_or_alias(tmp_path: Path) -> None:
    """Debian's generic kernel has ext4 as a module, which asks for crc32c only through a softdep."""
    (tmp_path / "modules.dep").write_text(
        "k/virtio_ring.ko.xz:\nk/virtio_pci.ko.xz: k/virtio_ring.ko.xz\nk/virtio_blk.ko.xz:\nk/virtio_console.ko.xz:\n"
        "k/ext4.ko.xz: k/jbd2.ko.xz k/mbcache.ko.xz\nk/jbd2.ko.xz:\nk/mbcache.ko.xz:\nk/crc32c_generic.ko.xz:\n"
    )
    (tmp_path / "modules.builtin").write_text("")
    (tmp_path / "modules.softdep").write_text("# comment\nsoftdep jbd2 pre: crc32c no-such post: ext4\n")
    (tmp_path / "modules.alias").write_text("alias crc32c crc32c_generic\n")
    order = initramfs.module_order(tmp_path)
    assert order.index("k/crc32c_generic.ko.xz") < order.index("k/jbd2.ko.xz") < order.index("k/ext4.ko.xz")


def test_a_kernel_without_virtio_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text("k/virtio_ring.ko:\n")
    (tmp_path / "modules.builtin").write_text("")
    with pytest.raises(ImageError, match="has no module virtio_pci"):
        initramfs.module_order(tmp_path)


def test_a_machines_initrd_holds_runtime_secret_and_settings(tmp_path: Path) -> None:
    base = tmp_path / "initramfs"
    base.write_bytes(initramfs.cpio([("init", 0o100755, b"#!/bin/sh\n")]))
    image = store.Image("0" * 64, "x", tmp_path, tmp_path / "d", tmp_path / "k", base, "3.11", (), 0.0, 0)
    data = initramfs.machine_initrd(image, {"preload": ["numpy"]}, b"secret")
    assert data.startswith(base.read_bytes())
    own = tmp_path / "own"
    own.mkdir()
    subprocess.run(["cpio", "--quiet", "-i", "-d"], input=data[base.stat().st_size :], cwd=own, check=True)
    assert (own / "agentvm/secret").read_bytes() == b"secret"
    assert (own / "agentvm/secret").stat().st_mode & 0o777 == 0o600
    assert (own / "agentvm/boot.json").read_text() == '{"preload": ["numpy"]}'
    assert (own / "agentvm/lib/guest_runtime/init.py").is_file()


def test_too_little_space_is_said_before_anything_is_begun() -> None:
    with pytest.raises(ImageError, match="GiB of disk space"):
        build_image(ImageSpec(name="tiny"), required_bytes=1 << 60)
    assert not [path for path in store.images_dir().iterdir() if path.is_dir()]


def _fake_image(name: str, digest: str) -> Path:
    folder = store.images_dir() / digest
    folder.mkdir()
    for file in (store.DISK, store.KERNEL, store.INITRAMFS):
        (folder / file).write_bytes(b"x")
    (folder / store.MANIFEST).write_text(
        f'{{"digest": "{digest}", "name": "{name}", "python_version": "3.11", "preload": [], "created": 1}}'
    )
    return folder


def test_find_and_remove() -> None:
    digest = "ab" * 32
    folder = _fake_image("mine", digest)
    assert store.find("mine").digest == store.find(digest[:8]).digest == digest
    with pytest.raises(ImageError, match="in use"):
        store.remove("mine", in_use={digest})
    assert folder.is_dir()
    store.remove("mine")
    assert not folder.exists()
    with pytest.raises(ImageError, match="agentvm image build"):
        store.find("mine")


def test_a_damaged_manifest_is_no_image() -> None:
    folder = _fake_image("mine", "cd" * 32)
    (folder / store.MANIFEST).write_text("{")
    assert store.list_images() == []


def test_an_image_that_lost_a_file_or_lies_about_its_digest_is_none() -> None:
    folder = _fake_image("mine", "cd" * 32)
    (folder / store.DISK).unlink()
    _fake_image("other", "ef" * 32).rename(store.images_dir() / ("01" * 32))
    assert store.list_images() == []


def test_an_image_is_named_by_eight_digits_at_least() -> None:
    _fake_image("mine", "ab" * 32)
    with pytest.raises(ImageError, match="no guest image"):
        store.find("ababab")
    with pytest.raises(ImageError, match="no guest image"):
        store.remove("../" + "ab" * 32)


def test_everybody_may_read_images_whatever_the_umask_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o077)
    try:
        folder = store.images_dir()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_normal_user_sees_the_images_that_root_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_image("shared", "ab" * 32)
    monkeypatch.setattr(store, "SHARED", store.images_dir())
    monkeypatch.delenv("AGENTVM_CACHE_DIR")
    monkeypatch.setattr(store.paths, "cache_dir", lambda: tmp_path)
    assert store.find("shared").folder == store.SHARED / ("ab" * 32)


def test_only_root_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ImageError, match="sudo agentvm image build"):
        build_image(ImageSpec(name="tiny"))


def test_tools_that_are_missing_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(ImageError, match="apt-get install mmdebstrap e2fsprogs qemu-utils"):
        build_image(ImageSpec(name="tiny"))
