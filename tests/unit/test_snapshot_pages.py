"""Delta files: any stack of them is what writing them one after the other would be."""

import mmap
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentvm_kernel.errors import SnapshotError
from agentvm_kernel.hypervisor import pages
from agentvm_kernel.hypervisor.pages import PAGE

TOTAL = 24
OWN_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
Content = dict[int, int]
"""By page, the byte that it is full of."""

contents = st.dictionaries(st.integers(0, TOTAL - 1), st.integers(0, 255))


def write_delta(path: Path, content: Content) -> Path:
    runs: list[pages.Run] = []
    for page in sorted(content):
        if runs and sum(runs[-1]) == page:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((page, 1))
    body = b"".join(bytes([content[page]]) * PAGE for page in sorted(content))
    path.write_bytes(pages.delta_header(runs) + body)
    return path


def read_memory(path: Path) -> list[int]:
    data = path.read_bytes()
    return [data[page * PAGE] for page in range(TOTAL)]


def sum_of(base: Content, deltas: list[Content]) -> list[int]:
    """What the memory should be; `deltas` newest first."""
    memory = dict(base)
    for delta in reversed(deltas):
        memory |= delta
    return [memory.get(page, 0) for page in range(TOTAL)]


def make_memory(path: Path, content: Content) -> Path:
    with open(path, "wb") as file:
        file.truncate(TOTAL * PAGE)
        for page, byte in content.items():
            file.seek(page * PAGE)
            file.write(bytes([byte]) * PAGE)
    return path


@pytest.fixture
def folder(tmp_path_factory):
    """A function that gives a fresh folder to each example."""
    return lambda: tmp_path_factory.mktemp("pages")


@OWN_FOLDER
@given(contents, st.lists(contents, max_size=4))
def test_applying_and_merging_are_the_sum(folder, base, deltas):
    here = folder()
    files = [write_delta(here / f"delta-{number}", delta) for number, delta in enumerate(deltas)]
    memory = make_memory(here / "memory", base)
    pages.apply_deltas(files, memory)
    assert read_memory(memory) == sum_of(base, deltas)
    merged = make_memory(here / "merged", base)
    assert pages.merge(here / "sum", files, TOTAL) == len(set().union(*deltas))
    pages.apply_deltas([here / "sum"], merged)
    assert read_memory(merged) == sum_of(base, deltas)
    whole = make_memory(here / "whole", {})
    pages.write_whole(here / "all", memory)
    pages.apply_deltas([here / "all"], whole)
    assert whole.read_bytes() == memory.read_bytes()


class FakeCapture:
    """The private pages of a process that there is not."""

    def __init__(self, content: Content) -> None:
        self.runs = [(page, 1) for page in sorted(content)]
        self.data = mmap.mmap(-1, max(len(content), 1) * PAGE)
        for number, page in enumerate(sorted(content)):
            self.data[number * PAGE : (number + 1) * PAGE] = bytes([content[page]]) * PAGE


@OWN_FOLDER
@given(contents, st.lists(contents, max_size=3), contents)
def test_what_is_written_of_a_capture_makes_its_memory_of_what_was_before(folder, base, deltas, private):
    here = folder()
    memory = make_memory(here / "memory", base)
    files = [write_delta(here / f"delta-{number}", delta) for number, delta in enumerate(deltas)]
    written = pages.write_changes(here / "new", FakeCapture(private), memory, files)
    # The machine sees its private pages and else the file, whatever the deltas say.
    wanted = sum_of(base, [private])
    assert written == sum(new != old for new, old in zip(wanted, sum_of(base, deltas), strict=True))
    pages.apply_deltas([here / "new", *files], memory)
    assert read_memory(memory) == wanted


def test_a_capture_of_this_process_and_back_into_it(tmp_path):
    path = make_memory(tmp_path / "memory", {number: number for number in range(TOTAL)})
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        assert mapped[3 * PAGE] == 3
        for page in (2, 3, 9):
            mapped[page * PAGE : page * PAGE + 5] = b"fresh"
        mappings = pages.find_mappings(os.getpid(), path)
        try:
            capture = pages.Capture(os.getpid(), mappings, tmp_path / "spill")
            assert capture.take() == 3
        except PermissionError:
            pytest.skip("this kernel does not let us read /proc/PID/pagemap")
        assert capture.runs == [(2, 2), (9, 1)]
        assert pages.write_changes(tmp_path / "delta", capture, path, []) == 3
        capture.close()
        assert not (tmp_path / "spill").exists()
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        pages.apply_to_process([tmp_path / "delta"], os.getpid(), pages.find_mappings(os.getpid(), path))
        assert mapped[9 * PAGE : 9 * PAGE + 6] == b"fresh\x09"
        assert mapped[2 * PAGE] == ord("f")
    assert path.read_bytes()[9 * PAGE] == 9


def test_where_memory_is_short_the_room_is_a_file(tmp_path, monkeypatch):
    path = make_memory(tmp_path / "memory", {})
    monkeypatch.setattr(pages, "available_memory", lambda: 0)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        mapped[5 * PAGE] = 5
        try:
            capture = pages.Capture(os.getpid(), pages.find_mappings(os.getpid(), path), tmp_path / "spill")
            assert capture.take() == 1
        except PermissionError:
            pytest.skip("this kernel does not let us read /proc/PID/pagemap")
        assert (tmp_path / "spill").stat().st_size >= PAGE
        assert capture.data[0] == 5
        capture.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: b"X" + data[1:],
        lambda data: data[:8] + (1 << 60).to_bytes(8, "little") + data[16:],
        lambda data: data[:12],
    ],
)
def test_a_damaged_delta_is_noticed(tmp_path, damage):
    delta = write_delta(tmp_path / "delta", {1: 1, 2: 2, 7: 7})
    delta.write_bytes(damage(delta.read_bytes()))
    with pytest.raises(SnapshotError, match=r"no delta|damaged"):
        pages.stack([delta], TOTAL)


def test_pages_beyond_the_end_are_refused(tmp_path):
    with pytest.raises(SnapshotError, match="beyond the end"):
        pages.stack([write_delta(tmp_path / "delta", {TOTAL: 1})], TOTAL)
