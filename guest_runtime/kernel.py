"""The Python kernel: one ipykernel process in a session of its own, started, interrupted, restarted and watched by the agent."""

import contextlib
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from guest_runtime.rpc import RpcError

LAUNCHER = Path(__file__).with_name("kernel_launcher.py")
PORTS = {"shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5}
RESEED_TIMEOUT_S = 15.0
START_TIMEOUT_S = 280.0


class PythonKernel:
    """The ipykernel process of this machine.

    Args:
        folder: for its connection file and sockets; nobody but its user and root may look in.
        preload: modules that are imported before it counts as ready.
        user: whose process it is; None leaves it to the agent's own user (local runs).
        on_ended: called in another thread when it ends by itself, with {"exit_code", "signal"}.
    """

    def __init__(
        self, folder: Path, preload: Sequence[str], user: str | None, on_ended: Callable[[dict[str, Any]], None]
    ) -> None:
        self.folder = folder
        self.failed_preload: dict[str, str] = {}
        self._preload = tuple(preload)
        self._user = pwd.getpwnam(user) if user else None
        self._on_ended = on_ended
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._reader: Any = None
        self._ready = threading.Event()
        self._talking = threading.Lock()

    @property
    def connection_file(self) -> Path:
        """What ipykernel and its clients read: Unix sockets, no key, since nothing but the agent gets at them."""
        return self.folder / "connection.json"

    def address(self, port: str) -> str:
        """ZeroMQ address of one of its sockets, such as "shell_port"."""
        return f"ipc://{self.folder}/k-{PORTS[port]}"

    def start(self) -> None:
        """Start it and return at once; `wait` tells when it is ready."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        settings = {
            "transport": "ipc",
            "ip": str(self.folder / "k"),
            **PORTS,
            "key": "",
            "signature_scheme": "hmac-sha256",
        }
        self.connection_file.write_text(json.dumps(settings))
        if self._user:
            os.chown(self.folder, self._user.pw_uid, self._user.pw_gid)
            os.chown(self.connection_file, self._user.pw_uid, self._user.pw_gid)
        ours, theirs = socket.socketpair()
        # As in ipykernel's own kernelspec: with frozen modules the debugger misses breakpoints, and says so in the first cell.
        command = [
            sys.executable,
            "-Xfrozen_modules=off",
            str(LAUNCHER),
            str(theirs.fileno()),
            str(self.connection_file),
            *self._preload,
        ]
        who: dict[str, Any] = {}
        if self._user:
            groups = os.getgrouplist(self._user.pw_name, self._user.pw_gid)
            who = {
                "user": self._user.pw_uid,
                "group": self._user.pw_gid,
                "extra_groups": groups,
                "cwd": self._user.pw_dir,
            }
        self._ready.clear()
        with theirs:
            # Its own session: an interrupt reaches the kernel and its children, and nothing else.
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), start_new_session=True, env=self._environment(),
                stdin=subprocess.DEVNULL, **who,
            )  # fmt: skip
        self._line = ours
        self._reader = ours.makefile("rb")
        threading.Thread(target=self._watch, args=(self._process,), daemon=True).start()

    def wait(self) -> dict[str, Any]:
        """Wait until it takes requests; return {"failed_preload": {module: error}}.

        Raises:
            RpcError: it ended instead, or took too long.
        """
        process = self._process
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._ready.wait(0.5):
            if process is None or process.poll() is not None:
                code = None if process is None else process.returncode
                raise RpcError(f"the Python kernel ended while it started (exit code {code})")
            if time.monotonic() > deadline:
                raise RpcError(f"the Python kernel was not ready within {START_TIMEOUT_S:g} s")
        return {"failed_preload": self.failed_preload}

    def interrupt(self) -> dict[str, Any]:
        """Send SIGINT to it and its children."""
        if self._process is None or self._process.poll() is not None:
            raise RpcError("there is no Python kernel to interrupt")
        os.killpg(self._process.pid, signal.SIGINT)
        return {}

    def restart(self) -> dict[str, Any]:
        """End it with everything in its session and start it anew."""
        self.kill()
        self.start()
        return self.wait()

    def status(self) -> dict[str, Any]:
        """Whether it runs and takes requests, and its process id."""
        running = self._process is not None and self._process.poll() is None
        return {"running": running, "ready": self._ready.is_set(), "pid": self._process.pid if self._process else None}

    def reseed(self, seed: bytes) -> None:
        """Seed `random` and `numpy.random` in the kernel process, and wait until it says that it has.

        Raises:
            RpcError: it did not confirm; the machine must not be handed out.
        """
        self.wait()
        line = self._line
        if line is None:
            raise RpcError("there is no Python kernel to reseed")
        with self._talking:
            try:
                line.settimeout(RESEED_TIMEOUT_S)
                line.sendall(json.dumps({"reseed": seed.hex()}).encode() + b"\n")
                answer = json.loads(self._reader.readline(4096))
            except (OSError, ValueError) as error:
                raise RpcError(f"the Python kernel did not confirm its new seeds: {error}") from error
        if not isinstance(answer, dict) or answer.get("reseeded") is not True:
            raise RpcError("the Python kernel could not be reseeded")

    def kill(self) -> None:
        """End it and every process of its session."""
        process, self._process = self._process, None
        if process is None:
            return
        for pid in session_members(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()

    def _environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "JUPYTER", "JPY_", "AGENTVM"))
        }
        if self._user:
            home = self._user.pw_dir
            kept |= {
                "HOME": home,
                "USER": self._user.pw_name,
                "LOGNAME": self._user.pw_name,
                "SHELL": self._user.pw_shell,
            }
        # As a kernel of Jupyter's finds it: figures show inline, tools may write colours.
        return kept | {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "TERM": "xterm-color", "PAGER": "cat"}

    def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        """Wait for the launcher's word that it is ready, then for its end."""
        reader = self._reader
        try:
            hello = json.loads(reader.readline(65536))
            failed = hello["failed"]
            if isinstance(failed, dict):
                self.failed_preload = {str(name): str(text)[:1000] for name, text in list(failed.items())[:100]}
            self._ready.set()
        except (OSError, ValueError, KeyError, TypeError):
            pass  # it ended first, which is what we wait for now
        code = process.wait()
        if process is self._process:
            self._on_ended({"exit_code": code if code >= 0 else None, "signal": -code if code < 0 else None})


def session_members(session: int) -> list[int]:
    """Return the ids of all processes of a session."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                # proc(5): the command's name is in parentheses and may hold anything; session is the 4th field after it.
                if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                    found.append(int(folder.name))
    return found
