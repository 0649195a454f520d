"""Initial RAM file systems: the one that belongs to an image, and what is added for one machine.

Format: "newc" cpio archives, one after another
(https://docs.kernel.org/driver-api/early-userspace/buffer-format.html). Standard library only.
"""

import hashlib
import json
import lzma
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agentvm_kernel.errors import ImageError
from agentvm_kernel.image.runtime import runtime_files
from agentvm_kernel.image.store import Image

# What a guest needs before its root file system is mounted, and what would need a modprobe later. virtio_ring comes
# before anything of virtio; modules.dep alone does not say so for every kernel.
NEEDED_MODULES = ("virtio_ring", "virtio_pci", "virtio_blk", "ext4", "virtio_console")
USEFUL_MODULES = ("virtio_rng", "vmw_vsock_virtio_transport", "virtio_net")


def cpio(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """Return a newc archive.

    Args:
        entries: (path without leading slash, st_mode, contents or link target), parents before children.
    """
    out = bytearray()
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        encoded = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        out += bytes(-len(out) % 4)
        out += data
        out += bytes(-len(out) % 4)
    return bytes(out)


def module_order(modules: Path) -> list[str]:
    """Return the files of the modules above and of what they depend on, in the order in which to load them.

    Formats: modules.dep(5), depmod.d(5) for soft dependencies.

    Args:
        modules: /lib/modules/VERSION of the guest, with modules.dep and modules.builtin.

    Raises:
        ImageError: a needed module is neither built in nor there.
    """
    depends: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        depends[path] = rest.split()
    by_name = {_module_name(path): path for path in depends}
    builtin = {_module_name(line) for line in (modules / "modules.builtin").read_text().splitlines()}
    # "softdep ext4 pre: crc32c post: other", where crc32c is an alias: "alias crc32c crc32c_generic".
    wanted_before: dict[str, list[str]] = {}
    soft = _text(modules / "modules.softdep")
    for name, words in re.findall(r"^softdep (\S+) .*?pre: (.*?)(?: post:.*)?$", soft, re.M):
        wanted_before.setdefault(_module_name(name), []).extend(words.split())
    aliases = dict(re.findall(r"^alias (\S+) (\S+)$", _text(modules / "modules.alias"), re.M))
    order: list[str] = []
    visited: set[str] = set()

    def add(path: str) -> None:
        if path in visited:
            return
        visited.add(path)
        for word in wanted_before.get(_module_name(path), ()):
            name = _module_name(word)
            if found := by_name.get(name) or by_name.get(_module_name(aliases.get(word, ""))):
                add(found)
        for needed in depends[path]:
            add(needed)
        order.append(path)

    for name in (*NEEDED_MODULES, *USEFUL_MODULES):
        if name in by_name:
            add(by_name[name])
        elif name in NEEDED_MODULES and name not in builtin:
            raise ImageError(f"The guest's kernel {modules.name} has no module {name}.", hint="Choose another kernel.")
    return order


def image_initramfs(root: Path, modules: Path) -> bytes:
    """Return the initramfs of an image.

    Args:
        root: the guest's root file system.
        modules: its /lib/modules/VERSION.
    """
    order = module_order(modules)
    busybox = next((path for name in ("bin/busybox", "usr/bin/busybox") if (path := root / name).is_file()), None)
    if busybox is None:
        raise ImageError("The guest has no busybox.", hint="Add busybox-static to the spec's packages.")
    names = [f"{number:02}-{_module_name(path)}.ko" for number, path in enumerate(order)]
    folders = [(name, 0o40755, b"") for name in ("bin", "dev", "proc", "sys", "root", "modules")]
    return cpio(
        [
            *folders,
            ("bin/busybox", 0o100755, busybox.read_bytes()),
            ("init", 0o100755, _init_script()),
            *((f"modules/{name}", 0o100644, _module(modules / path)) for name, path in zip(names, order, strict=True)),
            ("modules/order", 0o100644, "".join(f"{name}\n" for name in names).encode()),
        ]
    )


def machine_initrd(image: Image, boot: dict[str, Any], secret: bytes) -> bytes:
    """Return the initramfs of one machine: the image's, the guest runtime, and what only this machine may know.

    Args:
        image: what to boot.
        boot: settings for the runtime, as JSON in /run/agentvm/boot.json.
        secret: shared with the host's end of the connection.
    """
    own = [
        ("agentvm", 0o40755, b""),
        ("agentvm/secret", 0o100600, secret),
        ("agentvm/boot.json", 0o100600, json.dumps(boot).encode()),
        ("agentvm/lib", 0o40755, b""),
        ("agentvm/lib/guest_runtime", 0o40755, b""),
        *((f"agentvm/lib/guest_runtime/{name}", 0o100644, data) for name, data in runtime_files()),
    ]
    return image.initramfs.read_bytes() + cpio(own)


def init_digest() -> str:
    """Return the SHA-256 of the init script, a part of every image."""
    return hashlib.sha256(_init_script()).hexdigest()


def _init_script() -> bytes:
    return Path(__file__).with_name("init.sh").read_bytes()


def _module_name(path: str) -> str:
    return re.sub(r"\.ko(\.\w+)?$", "", Path(path).name).replace("-", "_")


def _module(path: Path) -> bytes:
    if path.suffix == ".ko":
        return path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    raise ImageError(f"Kernel module {path.name} is compressed in an unknown way.", hint="Choose a kernel of Debian.")


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
