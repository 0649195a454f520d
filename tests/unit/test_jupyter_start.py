"""What the kernel process imports and how it reads its command line."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentvm_kernel.jupyter import connection_file
from agentvm_kernel.jupyter.connection_file import parse_arguments
from agentvm_kernel.jupyter.kernel_app import EXIT_UNUSABLE

HEAVY = (
    "jupyter_client",
    "ipykernel",
    "IPython",
    "traitlets",
    "tornado",
    "pydantic",
    "structlog",
    "numpy",
    "ipywidgets",
    "comm",
    "zmq.asyncio",
    "zmq.green",
    "importlib.metadata",
    "http.client",
    "email",
)


@pytest.mark.parametrize(
    "module",
    [
        "agentvm_kernel.jupyter.kernel_app",
        "agentvm_kernel.jupyter.local_runtime",
        "agentvm_kernel.jupyter.machine_backend",
    ],
)
def test_the_kernel_process_imports_nothing_heavy(module):
    program = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert not set(HEAVY) & set(loaded)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-f", "/run/k.json"],
        ["-f=/run/k.json"],
        ["-f/run/k.json"],
        ["--f=/run/k.json"],
        ["--IPKernelApp.connection_file=/run/k.json"],
        ["--connection-file", "/run/k.json"],
        ["-f", "/run/k.json", "--HistoryManager.hist_file=/tmp/x", "--colors=NoColor", "-x"],
        ["--debug", "--no-secure", "--InteractiveShell.colors=x", "-f", "/run/k.json"],
    ],
)
def test_finds_the_connection_file_among_anything(arguments):
    assert parse_arguments(arguments) == Path("/run/k.json")


@pytest.mark.parametrize("arguments", [[], ["--debug"], ["-f"], ["-f="], ["--HistoryManager.hist_file=:memory:"]])
def test_no_connection_file(arguments):
    assert parse_arguments(arguments) is None


def test_a_bare_name_lies_in_the_runtime_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    assert parse_arguments(["-f", "kernel-x.json"]) == tmp_path / "kernel-x.json"
    assert parse_arguments(["-f", "sub/kernel-x.json"]) == Path.cwd() / "sub" / "kernel-x.json"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start kernel processes whose machines never come up, and end what is left of them."""
    processes = []
    environment = {
        **os.environ,
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "AGENTVM_LOCAL_RUNTIME": "1",
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("JPY_PARENT_PID", None)

    def start(*arguments, **extra):
        process = subprocess.Popen(
            [sys.executable, "-m", "agentvm_kernel", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, **extra},
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_without_a_file_it_writes_one_and_says_how_to_connect(start, tmp_path):
    process = start()
    line = process.stdout.readline()
    path = tmp_path / "runtime" / f"kernel-{process.pid}.json"
    assert f"--existing {path.name}" in line
    info = connection_file.load(path)
    assert info.key
    assert all(info.ports().values())
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert not path.exists()


def test_ports_it_chose_are_written_back(start, tmp_path):
    path = tmp_path / "k.json"
    path.write_text(json.dumps({"key": "k", "ip": "127.0.0.1", "shell_port": 0, "kernel_name": "agentvm"}))
    process = start("-f", str(path))
    while not connection_file.load(path).shell_port:
        assert process.poll() is None
    assert json.loads(path.read_text())["kernel_name"] == "agentvm"


def test_a_taken_port_ends_it_with_a_message(start, tmp_path):
    first = start()
    first.stdout.readline()
    taken = connection_file.load(tmp_path / "runtime" / f"kernel-{first.pid}.json")
    connection_file.save(tmp_path / "same.json", taken)
    second = start("-f", str(tmp_path / "same.json"))
    _, stderr = second.communicate(timeout=20)
    assert second.returncode == EXIT_UNUSABLE
    assert f"cannot listen on tcp://127.0.0.1:{taken.shell_port}" in stderr


def test_an_unreadable_file_ends_it_with_a_message(start, tmp_path):
    (tmp_path / "k.json").write_text("{")
    process = start("-f", str(tmp_path / "k.json"))
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == EXIT_UNUSABLE
    assert "k.json" in stderr


def test_it_ends_with_its_parent(tmp_path):
    """A server that is killed leaves no kernels behind."""
    program = (
        "import os, subprocess, sys; os.environ['JPY_PARENT_PID'] = str(os.getpid());"
        "p = subprocess.Popen([sys.executable, '-m', 'agentvm_kernel'], stdout=subprocess.PIPE, text=True);"
        "p.stdout.readline(); print(p.pid, flush=True); sys.stdin.readline()"
    )
    environment = {**os.environ, "JUPYTER_RUNTIME_DIR": str(tmp_path), "AGENTVM_LOCAL_RUNTIME": "1"}
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    kernel = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    assert select.select([kernel], [], [], 10)[0]
    os.close(kernel)
