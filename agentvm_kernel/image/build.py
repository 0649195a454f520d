"""Builds a guest image from a spec: Debian by mmdebstrap, Python packages by the host's pip, byte-compiled by the guest's Python.

Everything happens in a folder of its own that is renamed into place when it is complete, so a build that fails, is interrupted or
killed leaves nothing that could be taken for an image. Needs root, since the guest's files belong to the guest's users.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from agentvm_kernel import paths
from agentvm_kernel.errors import ImageError
from agentvm_kernel.image import initramfs, store
from agentvm_kernel.image.spec import ImageSpec
from agentvm_kernel.image.store import Image

RECIPE = 1
"""Raised whenever the same spec must give another image than before."""

OnProgress = Callable[[str, float, str], None]
"""Called with the stage, how much of the whole build is done (0 to 1) and what is happening right now."""

PREFIX = "opt/notebook"
USER = "notebook"
USER_ID = 1000
REQUIRED_BYTES = 4 * 1024**3
# Any glibc up to Debian 12's 2.36 (https://peps.python.org/pep-0600/).
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (36, 34, 31, 28, 27, 24, 17)), "manylinux2014_x86_64")
NAMESPACE = uuid.UUID("6a1fd1fc-5ad1-4f0e-a4f5-9a0b6c2f7d11")
_KEPT_LINES = 12
_UNNEEDED = ("usr/share/doc/*", "usr/share/man/*", "usr/share/locale/*", "usr/share/info/*", "var/cache/apt/*", "var/lib/apt/lists/*", "var/log/*", "boot/initrd.img*", "boot/System.map*")  # fmt: skip


def image_digest(spec: ImageSpec) -> str:
    """Return the digest of the image that a spec gives: 64 hexadecimal digits."""
    parts = {"recipe": RECIPE, "init": initramfs.init_digest(), "spec": spec.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def build_image(spec: ImageSpec, *, on_progress: OnProgress | None = None, required_bytes: int = REQUIRED_BYTES) -> Image:
    """Return the image of a spec, built unless it is there already.

    Several processes that want the same image build it once; the others wait.

    Args:
        spec: what to build.
        on_progress: told about every step.
        required_bytes: free disk space without which a build is not begun.

    Raises:
        ImageError: a tool, package, requirement, right or disk space is missing; nothing is left behind.
    """
    digest = image_digest(spec)
    images = store.images_dir()
    with _locked(images / f".lock-{digest[:16]}"):
        ready = [image for image in store.list_images() if image.digest == digest]
        if ready:
            return ready[0]
        _check_host(images, required_bytes)
        _remove_abandoned(images)
        work = images / f".building-{os.getpid()}-{digest[:8]}"
        work.mkdir(mode=0o700)
        try:
            with _terminable():
                _Build(spec, digest, work, on_progress or (lambda stage, done, detail: None)).run()
            work.chmod(0o711)
            shutil.rmtree(images / digest, ignore_errors=True)  # damaged, or it would have been found
            work.rename(images / digest)
        except OSError as error:
            raise ImageError(
                f"The image {spec.name!r} could not be built: {error.strerror or error}.",
                hint=f"Nothing was left behind. See how much space there is with: df -h {images}",
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return store.find(digest)


class _Build:
    """One build, in its own folder."""

    def __init__(self, spec: ImageSpec, digest: str, work: Path, on_progress: OnProgress) -> None:
        self.spec = spec
        self.digest = digest
        self.work = work
        self.root = work / "root"
        self.report = on_progress

    def run(self) -> None:
        self._debian()
        version = self._python_version()
        self._configure(version)
        self._packages(version)
        self._compile(version)
        self._pack(version)

    def _debian(self) -> None:
        packages = ",".join(sorted({*self.spec.packages, "busybox-static", "kmod", "python3", "sudo", self.spec.kernel}))
        seen = 0

        def on_line(line: str) -> None:
            nonlocal seen
            seen += 1
            self.report("Debian", 0.02 + 0.38 * min(1.0, seen / 14), line.removeprefix("I: "))

        # The kernel's own initramfs is not used: not building it saves a quarter of the time.
        self._tool(
            ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={packages}",
             "--aptopt=Acquire::Languages \"none\"", "--dpkgopt=path-exclude=/usr/share/man/*",
             "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
             self.spec.suite, str(self.root)],
            "Debian", "Check the names of suite and packages in the spec, and the network.",
            on_line=on_line, environment={"INITRD": "No"},
        )  # fmt: skip

    def _python_version(self) -> str:
        target = os.readlink(self.root / "usr/bin/python3")
        match = re.fullmatch(r"python(3\.\d+)", target)
        if match is None:
            raise ImageError(f"The guest's python3 is {target!r}, which is not a Python that is known here.")
        return match[1]

    def _configure(self, version: str) -> None:
        self.report("Users and settings", 0.41, "")
        root = self.root
        self._chroot(["/usr/sbin/useradd", "--create-home", "--uid", str(USER_ID), "--shell", "/bin/bash", USER], "user")
        self._write("etc/sudoers.d/notebook", f"{USER} ALL=(ALL:ALL) NOPASSWD:ALL\n", mode=0o440)
        self._write("etc/hostname", "agentvm\n")
        self._write("etc/hosts", "127.0.0.1 localhost agentvm\n::1 localhost\n")
        self._write("etc/resolv.conf", "")
        self._write("etc/machine-id", "")
        prefix = root / PREFIX
        for name in ("bin", f"lib/python{version}/site-packages"):
            (prefix / name).mkdir(parents=True)
        # A virtual environment (https://docs.python.org/3/library/venv.html) made by hand: no pip runs in the guest.
        (prefix / "pyvenv.cfg").write_text(f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {version}\n")
        for name in ("python", "python3", f"python{version}"):
            (prefix / "bin" / name).symlink_to("/usr/bin/python3")

    def _packages(self, version: str) -> None:
        site = self.root / PREFIX / f"lib/python{version}/site-packages"
        count = 0

        def on_line(line: str) -> None:
            nonlocal count
            if line.startswith(("Collecting", "Installing")):
                count += 1
                self.report("Python packages", 0.43 + 0.27 * (1 - 0.97**count), line)

        self._tool(
            [sys.executable, "-m", "pip", "install", "--target", str(site), "--python-version", version,
             "--implementation", "cp", *(part for name in PLATFORMS for part in ("--platform", name)),
             "--only-binary=:all:", "--no-compile", "--disable-pip-version-check", "--root-user-action=ignore",
             "--progress-bar=off", *self.spec.requirements],
            "Python packages", "Check the requirements in the spec (there must be wheels for them), and the network.",
            on_line=on_line,
        )  # fmt: skip
        if (site / "bin").is_dir():
            for script in (site / "bin").iterdir():
                data = script.read_bytes()
                script.write_bytes(re.sub(rb"\A#!.*\n", b"#!/opt/notebook/bin/python3\n", data))
                shutil.move(script, self.root / PREFIX / "bin" / script.name)
            (site / "bin").rmdir()
        if (site / "share").is_dir():
            shutil.copytree(site / "share", self.root / PREFIX / "share", dirs_exist_ok=True)
            shutil.rmtree(site / "share")

    def _compile(self, version: str) -> None:
        self.report("Byte code", 0.70, "compiling with the guest's Python")
        site = f"/{PREFIX}/lib/python{version}/site-packages"
        # Timestamps, not hashes: a checked hash makes every import read the source as well.
        self._chroot([f"/{PREFIX}/bin/python3", "-m", "compileall", "-q", "--invalidation-mode", "timestamp", site], "byte code",
                     fine=(0, 1))  # fmt: skip
        if any((self.root / site.lstrip("/")).glob("matplotlib/__init__.py")):
            self.report("Byte code", 0.84, "matplotlib's font cache")
            self._chroot([f"/{PREFIX}/bin/python3", "-c", "import matplotlib.font_manager"], "font cache", user=True)
        self._chroot(["/bin/chown", "-R", f"{USER}:{USER}", f"/{PREFIX}"], "owner")

    def _pack(self, version: str) -> None:
        self.report("Disk", 0.86, "cleaning up")
        for pattern in _UNNEEDED:
            for path in self.root.glob(pattern):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        kernel = max(self.root.glob("boot/vmlinuz-*"), default=None)
        if kernel is None:
            raise ImageError(f"The package {self.spec.kernel!r} brought no kernel.", hint="Name a linux-image-… package.")
        shutil.copyfile(kernel, self.work / store.KERNEL)
        modules = self.root / "usr/lib/modules" / kernel.name.removeprefix("vmlinuz-")
        (self.work / store.INITRAMFS).write_bytes(initramfs.image_initramfs(self.root, modules))
        raw = self.work / "root.raw"
        with raw.open("wb") as file:
            file.truncate(self.spec.disk_gib * 1024**3)
        identity = str(uuid.uuid5(NAMESPACE, self.digest))
        self.report("Disk", 0.88, "making the file system")
        self._tool(
            ["mke2fs", "-q", "-t", "ext4", "-m", "1", "-U", identity, "-E", f"hash_seed={identity},lazy_itable_init=1",
             "-d", str(self.root), str(raw)],
            "file system", "See how much space there is with: df -h",
        )  # fmt: skip
        self.report("Disk", 0.94, "converting to qcow2")
        self._tool(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(self.work / store.DISK)], "disk", "")
        raw.unlink()
        shutil.rmtree(self.root)
        for name in (store.DISK, store.KERNEL, store.INITRAMFS):
            (self.work / name).chmod(0o444)
        manifest = {
            "digest": self.digest,
            "name": self.spec.name,
            "python_version": version,
            "preload": list(self.spec.preload),
            "created": time.time(),
            "spec": self.spec.model_dump(mode="json"),
        }
        (self.work / store.MANIFEST).write_text(json.dumps(manifest, indent=1))
        self.report("Done", 1.0, "")

    def _write(self, name: str, text: str, *, mode: int = 0o644) -> None:
        path = self.root / name
        path.unlink(missing_ok=True)  # never through a link, which would lead to the host's file
        path.write_text(text)
        path.chmod(mode)

    def _chroot(self, command: list[str], what: str, *, user: bool = False, fine: tuple[int, ...] = (0,)) -> None:
        home = f"/home/{USER}" if user else "/root"
        who = ["--userspec", f"{USER_ID}:{USER_ID}"] if user else []
        clean = ["env", "-i", f"HOME={home}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]
        self._tool(["chroot", *who, str(self.root), *clean, *command], what, "", fine=fine)

    def _tool(
        self,
        command: Sequence[str],
        what: str,
        hint: str,
        *,
        on_line: Callable[[str], None] = lambda line: None,
        environment: Mapping[str, str] | None = None,
        fine: tuple[int, ...] = (0,),
    ) -> None:
        """Run one tool to its end, or raise an ImageError with the last lines that it printed."""
        last: deque[str] = deque(maxlen=_KEPT_LINES)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env={**os.environ, **(environment or {})}, start_new_session=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for line in map(str.strip, process.stdout):
                if line:
                    last.append(line)
                    on_line(line)
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # mmdebstrap cleans up after itself, mounts included
            process.wait()
            raise
        if code not in fine:
            if any("No space left on device" in line for line in last):
                hint = f"The disk is full: free some space in {self.work.parent} and try again."
            said = "\n  ".join(last)
            raise ImageError(
                f"The image {self.spec.name!r} could not be built: {Path(command[0]).name} failed ({what}).",
                hint=f"{hint} Nothing was left behind. It said:\n  {said}".strip(),
            )


def _check_host(images: Path, required_bytes: int) -> None:
    if os.geteuid() != 0:
        raise ImageError("Building a guest image needs root.", hint="Run: sudo agentvm image build")
    for tool, package in (("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs"), ("qemu-img", "qemu-utils")):
        if shutil.which(tool) is None:
            raise ImageError(f"{tool} is not installed.", hint=f"Run: apt-get install {package}")
    free = shutil.disk_usage(images).free
    if free < required_bytes:
        raise ImageError(
            f"Building an image takes {required_bytes / 1024**3:.1f} GiB of disk, but {images} has {free / 1024**3:.1f} GiB free.",
            hint=f"Free some space, or set AGENTVM_CACHE_DIR to a larger disk (now {paths.cache_dir()}).",
        )


def _remove_abandoned(images: Path) -> None:
    """Remove what killed builds left."""
    for folder in images.glob(".building-*"):
        pid = folder.name.split("-")[1]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that a terminated build cleans up as an interrupted one does."""

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: its owner handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
