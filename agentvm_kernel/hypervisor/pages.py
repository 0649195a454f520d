"""Memory pages of a running QEMU, and the files they are kept in.

A machine that was thawed maps its snapshot's memory file privately: what the guest has written since is exactly the mapping's anonymous
pages, which /proc/PID/pagemap tells apart (https://docs.kernel.org/admin-guide/mm/pagemap.html). They are kept in a delta file; the
parent's memory plus the delta is the new memory.

Delta file, little endian: 8 bytes MAGIC, u64 number of runs, for each run u64 first page and u64 number of pages, then the pages of all
runs in that order. Standard library only: the kernel process imports this module.
"""

import contextlib
import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agentvm_kernel.errors import SnapshotError

PAGE = 4096
MAGIC = b"AVMDELT1"
CHUNK = 1 << 20
_FICLONE = 0x40049409  # <linux/fs.h>
# The top byte of a pagemap entry: bit 63 present, 62 swapped, 61 file-mapped or shared anonymous. Private means (63 or 62) and not 61.
_PRIVATE = bytes(1 if (top & 0xC0) and not top & 0x20 else 0 for top in range(256))

Run = tuple[int, int]
"""First page and number of pages, counted from the start of the guest's memory."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """A part of a file in a process's address space.

    Attributes:
        start: first address.
        end: address after the last.
        offset: in the file, of the first.
    """

    start: int
    end: int
    offset: int


def find_mappings(pid: int, path: Path) -> list[Mapping]:
    """Return where a process maps `path` privately (proc(5), /proc/PID/maps).

    Raises:
        SnapshotError: it does not, or maps it shared.
    """
    found = []
    status = path.stat()
    number = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, mode, offset, device, inode, *name = line.split(maxsplit=5)
        # btrfs and overlayfs show another device number there than stat does, so the name will do as well.
        if int(inode) == status.st_ino and (device == number or name == [str(path)]):
            if mode[3] != "p":
                raise SnapshotError(f"Process {pid} maps {path} shared, so it has no private pages.")
            start, end = (int(address, 16) for address in span.split("-"))
            found.append(Mapping(start, end, int(offset, 16)))
    if not found:
        raise SnapshotError(
            f"Process {pid} does not map {path}.", hint="Only machines that were thawed from a snapshot can be frozen."
        )
    return found


def private_runs(pid: int, mapping: Mapping) -> list[Run]:
    """Return the runs of pages that the process has of its own in `mapping`.

    Raises:
        PermissionError: the kernel does not let us look.
    """
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(mapping.start // PAGE * 8)
        wanted = (mapping.end - mapping.start) // PAGE * 8
        entries = bytearray()
        while len(entries) < wanted and (part := pagemap.read(wanted - len(entries))):
            entries += part
    first = mapping.offset // PAGE
    flags = bytes(entries[7::8]).translate(_PRIVATE)
    return [(first + match.start(), match.end() - match.start()) for match in re.finditer(b"\x01+", flags)]


def write_delta(path: Path, pid: int, mappings: list[Mapping]) -> int:
    """Write the private pages of a paused process to a new delta file and return their number.

    Raises:
        PermissionError: the kernel does not let us read the process's memory (yama).
        SnapshotError: the process's memory ended early.
    """
    parts = [(mapping, private_runs(pid, mapping)) for mapping in mappings]
    runs = [run for _, found in parts for run in found]
    create = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(create, "wb", buffering=0) as out, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        out.write(delta_header(runs))
        buffer = memoryview(bytearray(CHUNK))
        filled = 0
        for mapping, found in parts:
            for first, pages in found:
                address = mapping.start + first * PAGE - mapping.offset
                left = pages * PAGE
                while left:
                    # Short runs are gathered, so that the number of writes does not depend on how scattered the pages are.
                    size = min(left, CHUNK - filled)
                    got = os.preadv(memory.fileno(), [buffer[filled : filled + size]], address)
                    if not got:
                        raise SnapshotError(f"The memory of process {pid} ended at {address:#x}.")
                    address, left, filled = address + got, left - got, filled + got
                    if filled == CHUNK:
                        _write_all(out.fileno(), buffer)
                        filled = 0
        _write_all(out.fileno(), buffer[:filled])
    return sum(pages for _, pages in runs)


def delta_header(runs: list[Run]) -> bytes:
    """Return what a delta file begins with."""
    return MAGIC + struct.pack(f"<{1 + 2 * len(runs)}Q", len(runs), *(number for run in runs for number in run))


def read_runs(delta: Path) -> tuple[list[Run], int]:
    """Return the runs of a delta file and the offset of the first page.

    Raises:
        SnapshotError: it is none, or is damaged.
    """
    with open(delta, "rb") as file:
        start = file.read(len(MAGIC) + 8)
        size = os.fstat(file.fileno()).st_size
        count = (
            struct.unpack("<Q", start[len(MAGIC) :])[0]
            if start.startswith(MAGIC) and len(start) == len(MAGIC) + 8
            else -1
        )
        if not 0 <= count <= size // 16:
            raise SnapshotError(f"{delta} is no delta file.")
        numbers = struct.unpack(f"<{2 * count}Q", file.read(16 * count))
    runs = list(zip(numbers[::2], numbers[1::2], strict=True))
    data = len(start) + 16 * count
    if data + sum(pages for _, pages in runs) * PAGE != size:
        raise SnapshotError(f"{delta} is damaged: its size is not what its table says.")
    return runs, data


def apply_delta(delta: Path, memory: Path) -> None:
    """Put the pages of a delta file into a memory file.

    Raises:
        SnapshotError: the delta is damaged or does not fit.
    """
    runs, source = read_runs(delta)
    with open(delta, "rb", buffering=0) as pages_file, open(memory, "r+b", buffering=0) as out:
        size = os.fstat(out.fileno()).st_size
        for first, pages in runs:
            if (first + pages) * PAGE > size:
                raise SnapshotError(f"{delta} has pages beyond the end of {memory}.")
            copy_range(pages_file.fileno(), out.fileno(), source, first * PAGE, pages * PAGE)
            source += pages * PAGE


def copy_sparse(source: Path, target: Path, *, mode: int = 0o600) -> None:
    """Copy a file with its holes; where the file system can share blocks (FICLONE), nothing is copied.

    Args:
        source: what to copy.
        target: a new file.
        mode: of the new file.
    """
    with open(source, "rb", buffering=0) as old:
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            try:
                fcntl.ioctl(descriptor, _FICLONE, old.fileno())
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS):
                    raise
            os.ftruncate(descriptor, os.fstat(old.fileno()).st_size)
            for start, end in data_segments(old.fileno()):
                copy_range(old.fileno(), descriptor, start, start, end - start)
        finally:
            os.close(descriptor)


def data_segments(descriptor: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a file that are not holes, as (start, end) (lseek(2), SEEK_DATA)."""
    end, size = 0, os.fstat(descriptor).st_size
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole until the end
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def copy_range(source: int, target: int, source_offset: int, target_offset: int, size: int) -> None:
    """Copy bytes between two open files inside the kernel where it can.

    Raises:
        SnapshotError: the source ended early.
    """
    while size:
        copied = 0
        with contextlib.suppress(OSError):
            copied = os.copy_file_range(source, target, size, source_offset, target_offset)
        if not copied:  # not between these file systems, or at the end: the plain way tells which
            copied = os.pwrite(target, os.pread(source, min(size, CHUNK), source_offset), target_offset)
            if not copied:
                raise SnapshotError(f"A file ended {size} bytes early while it was copied.")
        size, source_offset, target_offset = size - copied, source_offset + copied, target_offset + copied


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
