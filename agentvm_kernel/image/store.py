"""The guest images on this host. Standard library only: the kernel process finds its image through this module.

An image is a folder `images/<digest>` in the cache with `root.qcow2`, `vmlinuz`, `initramfs` and `manifest.json`. A normal
user also sees root's images, so that one `sudo agentvm image build` serves everybody.
"""

import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentvm_kernel import paths
from agentvm_kernel.errors import ImageError

MANIFEST = "manifest.json"
DISK = "root.qcow2"
KERNEL = "vmlinuz"
INITRAMFS = "initramfs"
SHARED = Path("/var/cache/agentvm/images")


@dataclass(frozen=True)
class Image:
    """A guest image, ready to boot and never written to.

    Attributes:
        digest: of everything that went into it, 64 hexadecimal digits.
        name: what its spec calls it.
        folder: where its files lie.
        disk: the root file system, a read-only qcow2.
        kernel: the Linux kernel to boot directly.
        initramfs: boot modules and the script that mounts the root; `initramfs.machine_initrd` completes it.
        python_version: of the guest, such as "3.11".
        preload: modules that the Python kernel imports before it is ready.
        created: seconds since the epoch.
        size: bytes on disk.
    """

    digest: str
    name: str
    folder: Path
    disk: Path
    kernel: Path
    initramfs: Path
    python_version: str
    preload: tuple[str, ...]
    created: float
    size: int


def images_dir() -> Path:
    """Return the folder in which this user's builds put one folder for each image."""
    folder = paths.cache_dir() / "images"
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)  # whatever the umask is: QEMU's user and other users must get at the images
    return folder


def list_images() -> list[Image]:
    """Return all complete images, newest first."""
    folders = [images_dir()]
    if "AGENTVM_CACHE_DIR" not in os.environ:
        folders.append(SHARED)
    found = {
        image.digest: image
        for folder in reversed(folders)
        for manifest in folder.glob(f"[0-9a-f]*/{MANIFEST}")
        if (image := _read(manifest)) is not None
    }
    return sorted(found.values(), key=lambda image: image.created, reverse=True)


def with_digest(digest: str) -> Image | None:
    """Return the image with exactly this digest, if it is there."""
    return next((image for image in list_images() if image.digest == digest), None)


def find(name: str) -> Image:
    """Return the newest image called `name`, or the one whose digest begins with it (8 digits at least).

    Raises:
        ImageError: there is none.
    """
    for image in list_images():
        if image.name == name or (len(name) >= 8 and image.digest.startswith(name)):
            return image
    raise ImageError(f"There is no guest image {name!r} on this host.", hint="Build it with: agentvm image build")


def remove(name: str, *, in_use: Collection[str] = ()) -> Image:
    """Delete an image and return what it was.

    Args:
        name: as for `find`.
        in_use: digests that machines or snapshots rest on.

    Raises:
        ImageError: there is no such image, something rests on it, or it belongs to somebody else.
    """
    image = find(name)
    title = f"{image.name} ({image.digest[:12]})"
    if image.digest in in_use:
        raise ImageError(
            f"Image {title} is in use by a machine or snapshot.",
            hint="`agentvm list` and `agentvm template list` show which.",
        )
    try:
        (image.folder / MANIFEST).unlink()  # first, so that nobody finds half an image
        shutil.rmtree(image.folder)
    except OSError as error:
        raise ImageError(
            f"Image {title} in {image.folder} could not be removed: {error.strerror}.",
            hint="An image that root built is removed with sudo.",
        ) from error
    return image


def _read(manifest: Path) -> Image | None:
    """Return an image, or nothing where a folder was removed meanwhile, is damaged or is not what its name says."""
    folder = manifest.parent
    try:
        data: dict[str, Any] = json.loads(manifest.read_text())
        image = Image(
            digest=str(data["digest"]),
            name=str(data["name"]),
            folder=folder,
            disk=folder / DISK,
            kernel=folder / KERNEL,
            initramfs=folder / INITRAMFS,
            python_version=str(data["python_version"]),
            preload=tuple(map(str, data["preload"])),
            created=float(data["created"]),
            size=sum((folder / name).stat().st_blocks * 512 for name in (DISK, KERNEL, INITRAMFS, MANIFEST)),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return image if image.digest == folder.name and re.fullmatch(r"[0-9a-f]{64}", image.digest) else None
