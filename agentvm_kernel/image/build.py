"""Builds a guest image from a spec: Debian by mmdebstrap, Python packages by the host's pip, byte code by the guest's Python.

Everything happens in a folder of its own that is renamed into place when it is complete, so a build that fails, is
interrupted or killed leaves nothing that could be taken for an image. Needs root, since the guest's files belong to the
guest's users. Imports pydantic (through the spec): the kernel process finds its image with `store` instead.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agentvm_kernel import paths
from agentvm_kernel.errors import ImageError
from agentvm_kernel.image import initramfs, store
from agentvm_kernel.image.python_packages import PythonPackages
from agentvm_kernel.image.spec import ImageSpec
from agentvm_kernel.image.store import Image
from agentvm_kernel.image.tools import ToolError, chroot, run, terminable

RECIPE = 4
"""Raised whenever the same spec must give another image than before."""

OnProgress = Callable[[str, float, str], None]
"""Called with the stage, how much of the whole build is done (0 to 1) and what is happening right now."""

REQUIRED_BYTES = 3 * 1024**3
USER = "notebook"
USER_ID = 1000
# nss-myhostname: a clone gets a new name, and sudo must find it without asking anybody.
_ALWAYS = ("busybox-static", "kmod", "libnss-myhostname", "python3", "sudo")
_NAMESPACE = uuid.UUID("6a1fd1fc-5ad1-4f0e-a4f5-9a0b6c2f7d11")
_EXCLUDED = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*")
_DELETE_S = 10.0
_UNNEEDED = ("usr/share/doc/*", "var/lib/apt/lists/*", "var/log/*", "boot/initrd.img*", "boot/System.map*")


def image_digest(spec: ImageSpec) -> str:
    """Return the digest of the image that a spec gives: 64 hexadecimal digits.

    The guest runtime has no part in it: machines get it at boot.
    """
    parts = {"recipe": RECIPE, "init": initramfs.init_digest(), "spec": spec.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def build_image(
    spec: ImageSpec, *, on_progress: OnProgress | None = None, required_bytes: int = REQUIRED_BYTES
) -> Image:
    """Return the image of a spec, built unless it is there already.

    Builds take turns: several processes that want the same image build it once.

    Args:
        spec: what to build.
        on_progress: told about every step.
        required_bytes: free disk space without which a build is not begun.

    Raises:
        ImageError: a tool, package, requirement, right or disk space is missing; nothing is left behind.
    """
    report = on_progress or (lambda stage, done, detail: None)
    digest = image_digest(spec)
    if (ready := store.with_digest(digest)) is not None:
        return ready
    _check_host()
    try:
        images = store.images_dir()
        with _locked(images / ".lock", report):
            if (ready := store.with_digest(digest)) is not None:
                return ready
            _remove_abandoned(images)
            _check_space(images, required_bytes)
            work = Path(tempfile.mkdtemp(prefix=".building-", dir=images))
            try:
                with terminable():
                    _Build(spec, digest, work, report).run()
                work.chmod(0o755)
                shutil.rmtree(images / digest, ignore_errors=True)  # damaged, or it would have been found
                work.rename(images / digest)
            finally:
                _delete(work)
    except ToolError as error:
        raise ImageError(
            f"The image {spec.name!r} could not be built: {error.message}",
            hint=f"{error.hint} Nothing was left behind.",
        ) from error
    except OSError as error:
        raise ImageError(
            f"The image {spec.name!r} could not be built: {error}.",
            hint=f"Nothing was left behind. See how much space there is with: df -h {paths.cache_dir()}",
        ) from error
    report("Done", 1.0, "")
    return store.find(digest)


class _Build:
    """One build, in a folder of its own."""

    def __init__(self, spec: ImageSpec, digest: str, work: Path, report: OnProgress) -> None:
        self.spec = spec
        self.digest = digest
        self.work = work
        self.root = work / "root"
        self.report = report

    def run(self) -> None:
        self._install_debian()
        python = self._find_python()
        self._configure()
        self._install_python_packages(python)
        self._clean()
        self._copy_kernel()
        self._make_disk()
        self._finish(python)

    def _install_debian(self) -> None:
        phase, total, seen = 0, 100, 0

        def on_line(line: str) -> None:
            # apt's and dpkg's own words. There are two rounds: essential packages, then the others.
            nonlocal phase, total, seen
            if match := re.search(r"(\d+) newly installed", line):
                phase, total, seen = phase + 1, max(1, int(match[1])), 0
            elif phase and line.startswith(("Get:", "Unpacking ", "Setting up ")):
                seen += 1
                part = min(1.0, seen / (3 * total))
                self.report("Debian", 0.02 + 0.18 * part if phase == 1 else 0.2 + 0.29 * part, line)

        self.report("Debian", 0.01, self.spec.suite)
        run(
            [
                "mmdebstrap", "--mode=root", "--format=directory", "--variant=minbase", "--verbose",
                f"--include={','.join(sorted({*self.spec.packages, *_ALWAYS, self.spec.kernel}))}",
                '--aptopt=Acquire::Languages "none"', *(f"--dpkgopt=path-exclude={path}" for path in _EXCLUDED),
                self.spec.suite, str(self.root),
            ],
            cwd=self.work,
            hint="Check the suite and the packages in the spec, the network and Debian's keys (debian-archive-keyring).",
            on_line=on_line,
            # Debian's own initramfs is not used, and takes a quarter of the time.
            environment={"INITRD": "No", "TMPDIR": str(self.work)},
        )  # fmt: skip

    def _find_python(self) -> str:
        """Return the guest's Python version, such as "3.11"."""
        target = os.readlink(self.root / "usr/bin/python3")
        match = re.fullmatch(r"python(3\.(\d+))", target)
        if match is None or int(match[2]) < 11:
            raise ImageError(
                f"The Python of Debian {self.spec.suite} is {target!r}, but the guest needs Python 3.11 or later.",
                hint="Use the suite bookworm or a later one.",
            )
        return match[1]

    def _configure(self) -> None:
        self.report("Settings", 0.49, "")
        user = ["useradd", "--create-home", "--uid", str(USER_ID), "--shell", "/bin/bash", USER]
        chroot(self.root, user, "Use the suite bookworm or a later one.")
        (self.root / "dev/shm").chmod(0o1777)  # as in a running system: compiling in several processes needs it
        self._write("etc/sudoers.d/notebook", f"{USER} ALL=(ALL:ALL) NOPASSWD:ALL\n", mode=0o440)
        self._write("etc/hostname", "agentvm\n")
        self._write("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")
        self._write("etc/resolv.conf", "")
        self._write("etc/machine-id", "")

    def _install_python_packages(self, python: str) -> None:
        packages = PythonPackages(self.root, python, self.work, user=(USER_ID, f"/home/{USER}"))
        packages.make_environment()

        def on_progress(part: float, line: str) -> None:
            self.report("Python packages", 0.5 + 0.3 * part, line)

        packages.install(self.spec.requirements, on_progress)
        self.report("Byte code", 0.8, "compiling with the guest's Python")
        packages.compile()
        self.report("Byte code", 0.88, "warming caches")
        packages.warm()

    def _clean(self) -> None:
        for pattern in _UNNEEDED:
            for path in self.root.glob(pattern):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _copy_kernel(self) -> None:
        kernel = max(self.root.glob("boot/vmlinuz-*"), default=None)
        if kernel is None:
            hint = "Name a linux-image-… package."
            raise ImageError(f"The package {self.spec.kernel!r} brought no kernel.", hint=hint)
        shutil.copyfile(kernel, self.work / store.KERNEL)
        modules = self.root / "usr/lib/modules" / kernel.name.removeprefix("vmlinuz-")
        (self.work / store.INITRAMFS).write_bytes(initramfs.image_initramfs(self.root, modules))

    def _make_disk(self) -> None:
        full = f"See how much space there is with: df -h {self.work.parent}"
        identity = str(uuid.uuid5(_NAMESPACE, self.digest))
        raw = self.work / "root.raw"
        with raw.open("wb") as file:
            file.truncate(self.spec.disk_gib * 1024**3)
        self.report("Disk", 0.9, "making the file system")
        options = f"hash_seed={identity},lazy_itable_init=1,lazy_journal_init=1"
        run(
            ["mke2fs", "-q", "-t", "ext4", "-m", "1", "-U", identity, "-E", options, "-d", str(self.root), str(raw)],
            cwd=self.work,
            hint=f"Perhaps the packages need more than disk_gib = {self.spec.disk_gib}. {full}",
        )
        shutil.rmtree(self.root)
        self.report("Disk", 0.95, "converting to qcow2")
        convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(self.work / store.DISK)]
        run(convert, cwd=self.work, hint=full)
        raw.unlink()

    def _finish(self, python: str) -> None:
        """Write the manifest, last, and get everything onto the disk before the folder's name says that it is complete."""
        manifest = {
            "digest": self.digest,
            "name": self.spec.name,
            "python_version": python,
            "preload": list(self.spec.preload),
            "created": time.time(),
            "spec": self.spec.model_dump(mode="json"),
        }
        (self.work / store.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in self.work.iterdir():
            if not path.is_file():
                shutil.rmtree(path)
                continue
            path.chmod(0o444)
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _write(self, name: str, text: str, *, mode: int = 0o644) -> None:
        path = self.root / name
        path.unlink(missing_ok=True)  # never through a link, which would lead to the host's file
        path.write_text(text)
        path.chmod(mode)


def _check_host() -> None:
    if os.geteuid() != 0:
        raise ImageError("Building a guest image needs root.", hint="Run once, for all users: sudo agentvm image build")
    tools = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "qemu-img": "qemu-utils", "unshare": "util-linux"}
    missing = [package for tool, package in tools.items() if shutil.which(tool) is None]
    if missing:
        raise ImageError(
            f"Building a guest image takes tools that are not installed: {', '.join(missing)}.",
            hint=f"Run: apt-get install {' '.join(missing)}",
        )


def _check_space(images: Path, required_bytes: int) -> None:
    free = shutil.disk_usage(images).free
    if free < required_bytes:
        needed, there = (f"{count / 1024**3:.1f} GiB" for count in (required_bytes, free))
        raise ImageError(
            f"Building an image takes {needed} of disk space, but {images} has {there} free.",
            hint="Free some space, or set AGENTVM_CACHE_DIR to a folder on a larger disk.",
        )


def _remove_abandoned(images: Path) -> None:
    """Remove what killed builds left: whoever holds the lock is the only one who builds."""
    for folder in images.glob(".building-*"):
        _delete(folder)


def _delete(folder: Path) -> None:
    """Delete a folder, patiently: tools that were killed take a moment to end, and may write until then.

    Tools mount in a namespace of their own, so nothing can be mounted here; if it is, this must not delete the host's files.
    """
    mounts = [line.split()[4].replace("\\040", " ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    if below := [mount for mount in mounts if mount.startswith(f"{folder}/")]:
        raise ImageError(f"{folder} cannot be deleted, since {below[0]} is mounted in it.", hint="Unmount it first.")
    until = time.monotonic() + _DELETE_S
    while folder.exists() and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)


@contextmanager
def _locked(path: Path, report: OnProgress) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("Waiting", 0.0, "another process is building an image")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
