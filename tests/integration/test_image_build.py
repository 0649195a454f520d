"""Real builds of a small image: built once by several, bootable, and nothing left of a build that fails or is ended."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from agentvm_kernel.errors import ImageError
from agentvm_kernel.image import initramfs, store
from agentvm_kernel.image.build import build_image
from agentvm_kernel.image.python_packages import PythonPackages
from agentvm_kernel.image.spec import ImageSpec, load_spec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="building an image needs root"),
    pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="building an image needs mmdebstrap"),
]

SPEC = 'name = "tiny"\ndisk_gib = 1\n'
BUILDER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the tests run in the background of a shell
from pathlib import Path
from agentvm_kernel.image.build import build_image
from agentvm_kernel.image.spec import load_spec
on_progress = lambda stage, done, detail: print(f"{stage}|{done}|{detail}", flush=True)
print("digest|" + build_image(load_spec(Path(sys.argv[1])), on_progress=on_progress).digest)
"""


def _start_builder(spec: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(spec)],
        env={**os.environ, "AGENTVM_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own."""
    monkeypatch.setenv("AGENTVM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A small image, asked for by two processes at once, and what they said."""
    folder = tmp_path_factory.mktemp("built")
    spec = folder / "tiny.toml"
    spec.write_text(SPEC)
    builders = [_start_builder(spec, folder / "cache") for _ in range(2)]
    said = [builder.communicate(timeout=280)[0].splitlines() for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], said
    return SimpleNamespace(cache=folder / "cache", spec=spec, said=said)


@pytest.fixture
def tiny(built: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> store.Image:
    monkeypatch.setenv("AGENTVM_CACHE_DIR", str(built.cache))
    return store.find("tiny")


def test_two_processes_build_once(built: SimpleNamespace, tiny: store.Image) -> None:
    assert [lines[-1] for lines in built.said] == [f"digest|{tiny.digest}"] * 2
    worked = [lines for lines in built.said if any(line.startswith("Disk|") for line in lines)]
    waited = [lines for lines in built.said if lines[0].startswith("Waiting|")]
    assert len(worked) == len(waited) == 1
    assert worked != waited


def test_progress_only_grows_and_ends_at_one(built: SimpleNamespace) -> None:
    lines = next(lines for lines in built.said if any(line.startswith("Disk|") for line in lines))
    done = [float(line.split("|")[1]) for line in lines[:-1]]
    assert done == sorted(done)
    assert done[-1] == 1.0
    assert len(set(done)) > 100


def test_an_image_that_is_there_is_not_built_again(built: SimpleNamespace, tiny: store.Image) -> None:
    def on_progress(stage: str, done: float, detail: str) -> None:
        pytest.fail(f"{stage} was begun")

    assert build_image(load_spec(built.spec), on_progress=on_progress) == tiny


def test_an_image_is_complete_read_only_and_open_to_qemu(tiny: store.Image) -> None:
    assert {path.name for path in tiny.folder.iterdir()} == {
        store.DISK, store.KERNEL, store.INITRAMFS, store.MANIFEST,
    }  # fmt: skip
    assert all(path.stat().st_mode & 0o777 == 0o444 for path in tiny.folder.iterdir())
    assert tiny.folder.stat().st_mode & 0o777 == tiny.folder.parent.stat().st_mode & 0o777 == 0o755
    assert {path.name for path in tiny.folder.parent.iterdir()} == {".lock", tiny.digest}
    assert json.loads((tiny.folder / store.MANIFEST).read_text())["spec"]["suite"] == "bookworm"


# What a guest prints instead of running the real runtime.
PROBE = """
import json, os, signal, subprocess, sys
import ipykernel
user = subprocess.run(["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--reset-env", "sh", "-c",
    "cd; pwd; sudo -n id -u; touch /opt/notebook/mine && echo writable; cat /run/agentvm/secret || echo secret"],
    capture_output=True, text=True).stdout.split()
print("PROBE" + json.dumps({
    "pid": os.getpid(), "prefix": sys.prefix, "boot": open("/run/agentvm/boot.json").read(), "user": user,
    "compiled": os.path.exists(ipykernel.__cached__), "rw": "/dev/vda / ext4 rw" in open("/proc/mounts").read(),
    "tmpfs": "tmpfs /run tmpfs" in open("/proc/mounts").read(), "path": sys.path[0],
}), flush=True)
open("/proc/sysrq-trigger", "w").write("o")
while True: signal.pause()
"""


def _boot(image: store.Image, initrd: Path, *options: str) -> str:
    command = [
        "qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-cpu", "max", "-m", "512", "-nographic", "-no-reboot",
        "-nic", "none", "-kernel", str(image.kernel), "-initrd", str(initrd), "-append", "console=ttyS0 quiet panic=-1",
        *options,
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=200)
    return done.stdout.decode(errors="replace")


@pytest.mark.guest
def test_the_runtime_is_process_1_on_a_writable_root(
    tiny: store.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [("__init__.py", b""), ("init.py", PROBE.encode())]
    monkeypatch.setattr(initramfs, "runtime_files", lambda: iter(files))
    (tmp_path / "initrd").write_bytes(initramfs.machine_initrd(tiny, {"a": 1}, b"secret"))
    overlay = tmp_path / "overlay.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(tiny.disk), "-F", "qcow2", str(overlay)]
    subprocess.run(create, check=True)
    console = _boot(tiny, tmp_path / "initrd", "-drive", f"if=virtio,format=qcow2,file={overlay}")
    line = next((line for line in console.splitlines() if "PROBE" in line), None)
    assert line is not None, console
    assert json.loads(line.partition("PROBE")[2]) == {
        "pid": 1,
        "prefix": "/opt/notebook",
        "boot": '{"a": 1}',
        "user": ["/home/notebook", "0", "writable", "secret"],
        "compiled": True,
        "rw": True,
        "tmpfs": True,
        "path": "/run/agentvm/lib",
    }


@pytest.mark.guest
def test_a_guest_without_disk_says_so_and_powers_off(tiny: store.Image, tmp_path: Path) -> None:
    (tmp_path / "initrd").write_bytes(initramfs.machine_initrd(tiny, {}, b"secret"))
    assert "agentvm: the guest cannot boot: no disk /dev/vda" in _boot(tiny, tmp_path / "initrd")


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder on a disk of 200 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m,mode=755,dev", "tmpfs", str(folder)], check=True)
    monkeypatch.setenv("AGENTVM_CACHE_DIR", str(folder))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _left(cache: Path) -> set[str]:
    return {path.name for path in (cache / "images").iterdir()}


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(small_disk: Path) -> None:
    with pytest.raises(ImageError, match="disk is full") as caught:
        build_image(ImageSpec(name="tiny"), required_bytes=0)
    assert "mmdebstrap failed" in str(caught.value)
    assert str(small_disk) in str(caught.value)
    assert _left(small_disk) == {".lock"}


def test_a_debian_package_that_does_not_exist_is_named(cache: Path) -> None:
    with pytest.raises(ImageError, match=r"Unable to locate package agentvm-no-such-package(.|\n)*Nothing was left"):
        build_image(ImageSpec(name="tiny", packages=("agentvm-no-such-package",)), required_bytes=0)
    assert _left(cache) == {".lock"}


def test_a_requirement_that_does_not_exist_is_named(tmp_path: Path) -> None:
    packages = PythonPackages(tmp_path, "3.11", tmp_path, user=(1000, "/home/notebook"))
    with pytest.raises(ImageError, match=r"pip failed(.|\n)*agentvm-no-such-package(.|\n)*requirements in the spec"):
        packages.install(["agentvm-no-such-package"], lambda part, line: None)


@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGINT, "Setting up"), (signal.SIGTERM, "Get:"), (signal.SIGHUP, "Debian")]
)
def test_an_ended_build_leaves_nothing(cache: Path, tmp_path: Path, number: signal.Signals, moment: str) -> None:
    (tmp_path / "tiny.toml").write_text(SPEC)
    builder = _start_builder(tmp_path / "tiny.toml", cache)
    assert builder.stdout is not None
    assert any(moment in line for line in builder.stdout)
    builder.send_signal(number)
    builder.communicate(timeout=30)
    assert builder.returncode != 0
    assert _left(cache) == {".lock"}
    assert _processes_of(cache) == []
    assert str(cache) not in Path("/proc/self/mountinfo").read_text()


def test_what_a_killed_build_left_is_removed_by_the_next(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(SPEC)
    builder = _start_builder(tmp_path / "tiny.toml", cache)
    assert builder.stdout is not None
    assert any("Setting up" in line for line in builder.stdout)
    builder.kill()
    builder.communicate(timeout=30)
    assert any(name.startswith(".building-") for name in _left(cache))
    assert str(cache) not in Path("/proc/self/mountinfo").read_text()  # or a clean-up would reach the host's /dev
    with pytest.raises(ImageError, match="suite"):
        build_image(ImageSpec(name="tiny", suite="no-such-suite"), required_bytes=0)
    assert _left(cache) == {".lock"}
    assert _processes_of(cache) == []
    assert str(cache) not in Path("/proc/self/mountinfo").read_text()


def test_nothing_is_deleted_through_a_mount(small_disk: Path) -> None:
    folder = store.images_dir() / ".building-old" / "root" / "proc"
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)
    (folder / "precious").touch()
    try:
        with pytest.raises(ImageError, match="is mounted in it"):
            build_image(ImageSpec(name="tiny"), required_bytes=0)
        assert (folder / "precious").exists()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_removed_image_is_gone(tiny: store.Image) -> None:
    with pytest.raises(ImageError, match="in use"):
        store.remove("tiny", in_use=[tiny.digest])
    assert store.remove(tiny.digest[:12]) == tiny
    assert _left(tiny.folder.parent.parent) == {".lock"}


def _processes_of(cache: Path) -> list[int]:
    """Processes that have the cache's path in their command line: mmdebstrap first, then what it started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # ended meanwhile
        if str(cache / "images").encode() in command:
            found.append(int(folder.name))
    return sorted(found)
