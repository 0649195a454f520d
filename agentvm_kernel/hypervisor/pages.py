"""Memory pages of a running QEMU, and the files they are kept in.

A machine that was thawed maps a memory file privately: what differs from the file is exactly the mapping's anonymous pages, which
/proc/PID/pagemap tells apart (https://docs.kernel.org/admin-guide/mm/pagemap.html). They are captured into our own memory while the
machine stands still, and what is new of them goes to a delta file; a memory file plus some deltas is the memory of a snapshot.

Delta file, little endian: 8 bytes MAGIC, u64 number of runs, for each run u64 first page and u64 number of pages, then the pages of all
runs in that order. Standard library only: the kernel process imports this module.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from agentvm_kernel.errors import SnapshotError

PAGE = 4096
MAGIC = b"AVMDELT1"
CHUNK = 1 << 20
SLACK = 4096
"""Pages that a machine may write between the making of room for a capture and its pause."""
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


class Capture:
    """The private pages of a process, copied while it is paused. Room for them is made before.

    Args:
        pid: of the process.
        mappings: of its memory file.
        spill: a file to be made for the room where our own memory is short; it may be deleted once `close` was called.

    Attributes:
        runs: what was copied.
        data: the pages of all runs, one after the other.
    """

    def __init__(self, pid: int, mappings: list[Mapping], spill: Path) -> None:
        self.runs: list[Run] = []
        self.data = mmap.mmap(-1, PAGE)
        self._pid = pid
        self._mappings = mappings
        self._spill = spill
        self._make_room(sum(pages for _, found in self._find() for _, pages in found) * 9 // 8 + SLACK)

    def take(self) -> int:
        """Copy the pages and return their number; to be called while the process stands still.

        Raises:
            PermissionError: the kernel does not let us read the process's memory (yama).
            SnapshotError: the process's memory ended early.
        """
        parts = self._find()
        self.runs = [run for _, found in parts for run in found]
        total = sum(pages for _, pages in self.runs)
        if total * PAGE > len(self.data):
            self._make_room(total)
        with memoryview(self.data) as room, open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
            at = 0
            for mapping, found in parts:
                for first, pages in found:
                    address, end = mapping.start + first * PAGE - mapping.offset, at + pages * PAGE
                    while at < end:
                        got = os.preadv(memory.fileno(), [room[at:end]], address)
                        if not got:
                            raise SnapshotError(f"The memory of process {self._pid} ended at {address:#x}.")
                        at, address = at + got, address + got
        return total

    def close(self) -> None:
        """Give the room back."""
        self.data.close()

    def _find(self) -> list[tuple[Mapping, list[Run]]]:
        return [(mapping, private_runs(self._pid, mapping)) for mapping in self._mappings]

    def _make_room(self, pages: int) -> None:
        self.data.close()
        if pages * PAGE < available_memory() // 2:
            # Present before the pause, or each page would cost a fault in it.
            self.data = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
            return
        descriptor = os.open(self._spill, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, pages * PAGE)  # a full disk is an error now, and no SIGBUS later
            self.data = mmap.mmap(descriptor, pages * PAGE)
        finally:
            os.close(descriptor)


def available_memory() -> int:
    """Return how many bytes of memory the host can spare."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of pages in a delta.

    Attributes:
        delta: number of the delta in the list that was asked about.
        first: first page.
        pages: how many.
        offset: of the first in the delta file.
    """

    delta: int
    first: int
    pages: int
    offset: int


def stack(deltas: Sequence[Path], total: int) -> list[Piece]:
    """Return what the sum of some deltas consists of: each page in the newest that has it.

    Args:
        deltas: newest first.
        total: pages of the memory.

    Raises:
        SnapshotError: one is damaged, or has pages beyond the end.
    """
    done = bytearray(total)
    pieces = []
    for number, delta in enumerate(deltas):
        runs, offset = read_runs(delta)
        for first, pages in runs:
            end = first + pages
            if end > total:
                raise SnapshotError(f"{delta} has pages beyond the end of the memory.")
            at = done.find(0, first, end)
            while at >= 0:
                covered = done.find(1, at, end)
                stop = end if covered < 0 else covered
                pieces.append(Piece(number, at, stop - at, offset + (at - first) * PAGE))
                done[at:stop] = b"\1" * (stop - at)
                at = done.find(0, stop, end)
            offset += pages * PAGE
    return pieces


def write_changes(path: Path, capture: Capture, base: Path, deltas: Sequence[Path]) -> int:
    """Write a new delta file with the pages of a capture that differ from the sum of a memory file and deltas; return their number.

    Args:
        path: of the new file.
        capture: all private pages of a machine that maps `base`.
        base: memory file.
        deltas: what comes on top of it, newest first.
    """
    with contextlib.ExitStack() as opened:

        def content(file: Path) -> mmap.mmap:
            with open(file, "rb") as descriptor:
                return opened.enter_context(mmap.mmap(descriptor.fileno(), 0, prot=mmap.PROT_READ))

        memory = content(base)
        contents = [content(delta) for delta in deltas]
        old: dict[int, tuple[mmap.mmap, int]] = {}
        for piece in stack(deltas, len(memory) // PAGE):
            for number in range(piece.pages):
                old[piece.first + number] = contents[piece.delta], piece.offset + number * PAGE
        runs: list[Run] = []
        sources: list[tuple[mmap.mmap, int]] = []  # of each run, where its pages are

        def add(source: mmap.mmap, page: int, at: int) -> None:
            if runs and sources[-1][0] is source:
                first, pages = runs[-1]
                if first + pages == page and sources[-1][1] + pages * PAGE == at:
                    runs[-1] = first, pages + 1
                    return
            runs.append((page, 1))
            sources.append((source, at))

        data, at = capture.data, 0
        for first, pages in capture.runs:
            for page in range(first, first + pages):
                before, place = old.pop(page, (memory, page * PAGE))
                if data[at : at + PAGE] != before[place : place + PAGE]:
                    add(data, page, at)
                at += PAGE
        for page in sorted(old):  # the machine has given its own page back, so it sees the file's again
            before, place = old[page]
            if memory[page * PAGE : page * PAGE + PAGE] != before[place : place + PAGE]:
                add(memory, page, page * PAGE)
        with _new_file(path) as out:
            out.write(delta_header(runs))
            for (_, pages), (source, at) in zip(runs, sources, strict=True):
                with memoryview(source) as view, view[at : at + pages * PAGE] as part:
                    out.write(part)
    return sum(pages for _, pages in runs)


def merge(path: Path, deltas: Sequence[Path], total: int) -> int:
    """Write a new delta file that is the sum of others, newest first; return the number of its pages."""
    pieces = stack(deltas, total)
    with contextlib.ExitStack() as opened, _new_file(path) as out:
        files = [opened.enter_context(open(delta, "rb", buffering=0)) for delta in deltas]
        out.write(delta_header([(piece.first, piece.pages) for piece in pieces]))
        out.flush()
        at = out.tell()
        for piece in pieces:
            copy_range(files[piece.delta].fileno(), out.fileno(), piece.offset, at, piece.pages * PAGE)
            at += piece.pages * PAGE
    return sum(piece.pages for piece in pieces)


def write_whole(path: Path, memory: Path) -> int:
    """Write all of a memory file that is not a hole as a delta on top of nothing; return the number of pages."""
    with open(memory, "rb", buffering=0) as source, _new_file(path) as out:
        spans = [(start // PAGE, -(-end // PAGE)) for start, end in data_segments(source.fileno())]
        runs = [(first, end - first) for first, end in spans]
        out.write(delta_header(runs))
        out.flush()
        at = out.tell()
        for first, pages in runs:
            copy_range(source.fileno(), out.fileno(), first * PAGE, at, pages * PAGE)
            at += pages * PAGE
    return sum(pages for _, pages in runs)


def apply_deltas(deltas: Sequence[Path], memory: Path) -> None:
    """Put the sum of deltas, newest first, into a memory file.

    Raises:
        SnapshotError: a delta is damaged or does not fit.
    """
    pieces = stack(deltas, memory.stat().st_size // PAGE)
    with contextlib.ExitStack() as opened, open(memory, "r+b", buffering=0) as out:
        files = [opened.enter_context(open(delta, "rb", buffering=0)) for delta in deltas]
        for piece in pieces:
            copy_range(files[piece.delta].fileno(), out.fileno(), piece.offset, piece.first * PAGE, piece.pages * PAGE)


def apply_to_process(deltas: Sequence[Path], pid: int, mappings: list[Mapping]) -> None:
    """Put the sum of deltas, newest first, into the memory of a process, which gets private pages by that.

    Raises:
        PermissionError: the kernel does not let us (yama).
        SnapshotError: a delta is damaged or does not fit.
    """
    total = max(mapping.offset + mapping.end - mapping.start for mapping in mappings) // PAGE
    pieces = stack(deltas, total)
    with contextlib.ExitStack() as opened:
        memory = opened.enter_context(open(f"/proc/{pid}/mem", "r+b", buffering=0))
        views = []
        for delta in deltas:
            with open(delta, "rb") as file:
                content = opened.enter_context(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            views.append(opened.enter_context(memoryview(content)))
        for piece in pieces:
            for mapping in mappings:
                begin = max(piece.first * PAGE, mapping.offset)
                end = min((piece.first + piece.pages) * PAGE, mapping.offset + mapping.end - mapping.start)
                at = piece.offset + begin - piece.first * PAGE
                while begin < end:
                    with views[piece.delta][at : at + end - begin] as part:
                        put = os.pwrite(memory.fileno(), part, mapping.start + begin - mapping.offset)
                    begin, at = begin + put, at + put


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


def _new_file(path: Path) -> BinaryIO:
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")
