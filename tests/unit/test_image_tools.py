"""The tools of an image build: what is said when they fail, and that none survives a build."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from agentvm_kernel.errors import ImageError
from agentvm_kernel.image import python_packages, tools
from agentvm_kernel.image.python_packages import PythonPackages
from agentvm_kernel.image.tools import ToolError, run

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="tools run in namespaces, which needs root")


@needs_root
def test_a_failure_ends_with_the_last_lines_and_says_what_to_do(tmp_path: Path) -> None:
    script = "for n in $(seq 30); do echo line $n; done; echo oops >&2; exit 7"
    with pytest.raises(ToolError, match=r"sh failed with exit code 7(.|\n)*line 30\n  oops\n Do this\.") as caught:
        run(["sh", "-c", script], cwd=tmp_path, hint="Do this.")
    assert "line 3\n" not in str(caught.value)


@needs_root
def test_a_full_disk_is_recognised_even_when_the_tool_says_it_early_or_ends_well(tmp_path: Path) -> None:
    script = "echo write: No space left on device; seq 50"
    with pytest.raises(ToolError, match="disk is full"):
        run(["sh", "-c", script], cwd=tmp_path, hint="")


@needs_root
def test_lines_are_followed_and_the_end_of_the_output_comes_back(tmp_path: Path) -> None:
    seen: list[str] = []
    assert run(
        ["sh", "-c", "echo a; echo; echo b >&2; exit 1"], cwd=tmp_path, hint="", on_line=seen.append, accept=(1,)
    )
    assert seen == ["a", "b"]


@pytest.fixture
def alive(tmp_path: Path) -> Iterator[IO[str]]:
    """The reading end of a FIFO `alive`: it ends once nobody is left who has opened it for writing."""
    os.mkfifo(tmp_path / "alive")
    with os.fdopen(os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)) as file:
        os.set_blocking(file.fileno(), True)
        yield file


SCRIPT = "trap '' TERM INT; exec 9>alive; (setsid sleep 1000 >/dev/null 2>&1) & echo started; wait"


@needs_root
def test_a_tool_and_its_children_end_when_the_build_is_interrupted(tmp_path: Path, alive: IO[str]) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(["sh", "-c", SCRIPT], cwd=tmp_path, hint="", on_line=interrupt)
    assert alive.read() == ""


@needs_root
def test_a_tool_and_its_children_end_when_the_builder_is_killed(tmp_path: Path, alive: IO[str]) -> None:
    script = f"""
import os, signal
from pathlib import Path
from agentvm_kernel.image.tools import run
def die(line): os.kill(os.getpid(), signal.SIGKILL)
run(["sh", "-c", {SCRIPT!r}], cwd=Path({str(tmp_path)!r}), hint="", on_line=die)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert alive.read() == ""


class _FakeGuest:
    """Stands for pip on the host and in the guest: the guest's says `checks`, one after another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, checks: list[str]) -> None:
        self.checks = checks
        self.installed: list[list[str]] = []
        monkeypatch.setattr(python_packages, "chroot", lambda root, command, *rest, **more: self.checks.pop(0))
        monkeypatch.setattr(PythonPackages, "_pip", lambda this, wanted, options, on_line: self._pip(wanted, options))

    def _pip(self, wanted: list[str], options: list[str]) -> None:
        self.installed.append([*options, *wanted])


def _packages(tmp_path: Path) -> PythonPackages:
    return PythonPackages(tmp_path, "3.11", tmp_path, user=(1000, "/home/notebook"))


def test_what_the_guests_python_lacks_is_installed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = _FakeGuest(
        monkeypatch,
        [
            "ipython 9.1 requires typing_extensions, which is not installed.\nx 1 requires b-c, which is not installed.",
            "No broken requirements found.",
        ],
    )
    _packages(tmp_path).install(["numpy"], lambda part, line: None)
    assert guest.installed == [["ipykernel>=7", "pip", "numpy"], ["--no-deps", "b-c", "typing_extensions"]]


def test_packages_that_do_not_fit_together_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _FakeGuest(monkeypatch, ["a 1 has requirement b<2, but you have b 2."])
    with pytest.raises(ImageError, match="do not fit together: a 1 has requirement b<2"):
        _packages(tmp_path).install([], lambda part, line: None)


def test_scripts_and_data_go_into_the_prefix_and_their_lists_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = _packages(tmp_path)
    info = packages.site / "x-1.dist-info"
    for folder in (info, packages.site / "bin", packages.site / "share/x", packages.prefix / "bin"):
        folder.mkdir(parents=True)
    (packages.prefix / "bin/python3").symlink_to("/usr/bin/python3")
    (packages.site / "bin/x").write_text("#!/host/venv/bin/python3.13\nprint()\n")
    (packages.site / "bin/y").write_text("#!/bin/sh\n")
    (packages.site / "share/x/data").write_text("data")
    (info / "RECORD").write_text('../../bin/x,sha256=1,2\n"../../share/x/data",,\n../../../evil,,\nx/__init__.py,,\n')
    packages._move_scripts_and_data()
    assert (packages.prefix / "bin/x").read_text() == "#!/opt/notebook/bin/python3\nprint()\n"
    assert (packages.prefix / "bin/y").read_text() == "#!/bin/sh\n"
    assert (packages.prefix / "share/x/data").read_text() == "data"
    assert not (packages.site / "bin").exists()
    lines = (info / "RECORD").read_text().splitlines()
    assert lines == ["../../../bin/x,sha256=1,2", '"../../../share/x/data",,', "../../../evil,,", "x/__init__.py,,"]


def test_interrupts_are_left_to_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), tools.terminable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
