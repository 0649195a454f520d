"""The command line: help, exit codes, and one clear message for each kind of wrong input."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from agentvm_kernel import __version__, cli
from agentvm_kernel.commands import image as image_command
from agentvm_kernel.commands import install as install_command
from agentvm_kernel.commands import version as version_command
from agentvm_kernel.errors import HostError
from agentvm_kernel.image import store

HEAVY = {
    "pydantic",
    "structlog",
    "rich",
    "nbformat",
    "nbclient",
    "jupyter_client",
    "ipykernel",
    "traitlets",
    "zmq",
    "libvirt",
}


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    """No settings of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("AGENTVM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("AGENTVM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("AGENTVM_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("AGENTVM_RUN_DIR", str(tmp_path / "run"))


@pytest.fixture
def book(tmp_path) -> Path:
    path = tmp_path / "book.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), path)
    return path


def refused(capsys, *arguments: object) -> str:
    """Run a command that must fail with exit code 1 and no traceback; return what it said."""
    assert cli.main([str(argument) for argument in arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("agentvm: ")
    assert "Traceback" not in said
    return said


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {command.NAME} " in text for command in cli.COMMANDS)


@pytest.mark.parametrize("command", [command.NAME for command in cli.COMMANDS])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert "--debug" in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    code = "import sys\nfrom agentvm_kernel import cli\ntry: cli.main(['run', '--help'])\nexcept SystemExit: print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(cli.__file__).parents[1],
    )
    assert not HEAVY & set(result.stdout.split())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["run"],
        ["run", "x.ipynb", "--timeout", "-1"],
        ["run", "x.ipynb", "--timeout", "nan"],
        ["install"],
        ["install", "--user", "--sys-prefix"],
        ["image"],
    ],
)
def test_wrong_usage_ends_with_2(arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2


def test_version_of_the_program(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"agentvm {__version__}"


def test_version_tells_why_it_cannot_ask_libvirt(capsys, monkeypatch):
    monkeypatch.setenv("AGENTVM_URI", "qemu+tcp://127.0.0.1:1/system")
    assert cli.main(["version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["agentvm", __version__]
    assert lines[2].startswith("libvirt  unknown: ")
    assert "127.0.0.1:1" in lines[2]


def test_run_without_a_notebook_there(capsys, tmp_path):
    assert "Cannot read the notebook" in refused(capsys, "run", tmp_path / "no.ipynb")


def test_run_something_else_than_a_notebook(capsys, tmp_path):
    (tmp_path / "x.ipynb").write_text("print(1)")
    assert "is not a notebook" in refused(capsys, "run", tmp_path / "x.ipynb")


def test_run_with_an_output_that_cannot_be_written(capsys, book, tmp_path):
    said = refused(capsys, "run", book, "-o", tmp_path / "no" / "out.ipynb")
    assert "Cannot write" in said
    assert "-o" in said


def test_run_with_a_profile_that_does_not_exist(capsys, book):
    said = refused(capsys, "run", book, "--profile", "huge")
    assert "There is no profile 'huge'" in said
    assert "light, standard, intensive" in said


def test_run_with_a_parameter_without_a_value(capsys, book):
    assert "NAME=VALUE" in refused(capsys, "run", book, "-p", "x")


def test_run_with_a_kernel_that_does_not_exist(capsys, book):
    assert "There is no kernel 'cobol'" in refused(capsys, "run", book, "--kernel", "cobol")


def test_run_with_a_profile_for_a_kernel_without_a_machine(capsys, book):
    assert "--profile" in refused(capsys, "run", book, "--kernel", "python3", "--profile", "light")


def test_the_hint_stands_below_the_message(capsys, monkeypatch):
    def fail(options):
        raise HostError("It broke.", hint="Do this.\nOr that.")

    monkeypatch.setattr(version_command, "execute", fail)
    assert refused(capsys, "version") == "agentvm: It broke.\n         Do this.\n         Or that.\n"


def test_an_error_of_our_own_making_is_one_line_too(capsys, monkeypatch):
    def fail(options):
        raise KeyError("x")

    monkeypatch.setattr(version_command, "execute", fail)
    said = refused(capsys, "version")
    assert "internal error, KeyError: 'x'" in said
    assert "--debug" in said


@pytest.mark.parametrize("arguments", [["--debug", "version"], ["version", "--debug"]])
def test_debug_shows_the_traceback(monkeypatch, arguments):
    def fail(options):
        raise HostError("It broke.")

    monkeypatch.setattr(version_command, "execute", fail)
    with pytest.raises(HostError):
        cli.main(arguments)


def test_ctrl_c_ends_with_130(capsys, monkeypatch):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(version_command, "execute", interrupt)
    assert cli.main(["version"]) == 130
    assert capsys.readouterr().err == "agentvm: interrupted\n"


def test_a_reader_that_goes_away_is_no_traceback(own_settings):
    command = f"{sys.executable} -m agentvm_kernel.cli image list | true"
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, cwd=Path(cli.__file__).parents[1]
    )
    assert "Traceback" not in result.stderr


def test_install_says_where(capsys, tmp_path):
    assert cli.main(["install", "--prefix", str(tmp_path)]) == 0
    folder = tmp_path / "share" / "jupyter" / "kernels" / "agentvm"
    assert (folder / "kernel.json").is_file()
    assert str(folder) in capsys.readouterr().out


def test_install_where_nothing_can_be_written(capsys):
    assert "--user" in refused(capsys, "install", "--prefix", "/proc")


def test_install_under_a_name_that_cannot_be_one(capsys, tmp_path):
    assert "cannot be installed" in refused(capsys, "install", "--prefix", tmp_path, "--name", "a/b")


def test_without_images_the_list_says_how_to_get_one(capsys):
    assert cli.main(["image", "list"]) == 0
    assert "agentvm image build" in capsys.readouterr().out


@pytest.fixture
def an_image() -> store.Image:
    """A complete image, as far as files can tell."""
    import json

    digest = "ab" * 32
    folder = store.images_dir() / digest
    folder.mkdir()
    for name in (store.DISK, store.KERNEL, store.INITRAMFS):
        (folder / name).write_bytes(b"x")
    manifest = {"digest": digest, "name": "mine", "python_version": "3.11", "preload": [], "created": 0}
    (folder / store.MANIFEST).write_text(json.dumps(manifest))
    return store.find("mine")


def test_images_are_listed(capsys, an_image):
    assert cli.main(["image", "list"]) == 0
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line[:3] == ["mine", an_image.digest[:12], "3.11"]


def test_an_image_is_removed(capsys, an_image):
    assert cli.main(["image", "remove", "mine"]) == 0
    assert not an_image.folder.exists()
    assert "There is no guest image" in refused(capsys, "image", "remove", "mine")


def test_an_image_that_a_machine_rests_on_stays(capsys, an_image, tmp_path):
    from agentvm_kernel.hypervisor.qcow2 import create_overlay

    base = tmp_path / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(base), "1M"], check=True)
    machine = tmp_path / "state" / "machines" / "agentvm-1"
    machine.mkdir(parents=True)
    create_overlay(machine / "overlay.qcow2", base, recorded_backing=an_image.disk)
    (machine / "other.qcow2").write_text("not a disk")
    assert "is in use" in refused(capsys, "image", "remove", "mine")
    assert an_image.disk.exists()
    cli.main(["image", "list"])
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "yes"


def test_a_spec_that_does_not_exist_names_those_that_are_shipped(capsys):
    assert "default" in refused(capsys, "image", "build", "no.toml")


def test_progress_of_a_build_is_a_line_for_each_stage(capsys):
    tell = image_command._stage_lines()
    tell("Debian", 0.0, "a")
    tell("Debian", 0.1, "b")
    tell("Disk", 0.9, "")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[-2:] for line in lines] == [["0%", "Debian"], ["90%", "Disk"]]


def test_every_command_declares_what_the_table_needs():
    for command in cli.COMMANDS:
        assert command.HELP
        assert not command.HELP.endswith(".")
    assert install_command in cli.COMMANDS
