"""The Python kernel: one ipykernel process in a session of its own, started, interrupted, restarted and watched by the agent.

Standard library only. Each start has a fresh folder for its sockets, so that nothing of an earlier one (or of the user's code in it) is
in the way. What the process writes past ipykernel is read here, and its end is shown when the kernel dies.
"""

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from guest_runtime.rpc import INVALID_PARAMS, RpcError

LAUNCHER = Path(__file__).with_name("kernel_launcher.py")
PORTS = {"shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5}
RESEED_TIMEOUT_S = 15.0
START_TIMEOUT_S = 280.0
RESTARTS = 3
RESTART_PERIOD_S = 60.0
LOG_SIZE = 8192


def address(folder: Path, port: str) -> str:
    """Return the ZeroMQ address of one of the kernel's sockets, such as "shell_port"."""
    return f"ipc://{folder}/k-{PORTS[port]}"


class _Run:
    """One ipykernel process, from its start to its end."""

    def __init__(self, process: "subprocess.Popen[bytes]", line: socket.socket, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.line = line
        self.answers: BinaryIO = line.makefile("rb")
        self.failed_preload: dict[str, str] = {}
        self.ready = False
        self.ended = False
        self._log = bytearray()
        assert process.stdout is not None  # noqa: S101 (we asked for it)
        self._output: Any = process.stdout
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    @property
    def log(self) -> str:
        """The end of what it wrote past ipykernel: Python's own complaints, mostly."""
        return self._log.decode(errors="replace")

    def finish_log(self) -> None:
        """Wait a moment for what a dead process wrote last; a child of it may keep the pipe open for ever."""
        self._reader.join(0.5)

    def _read_log(self) -> None:
        while data := self._output.read1(65536):
            self._log += data
            del self._log[:-LOG_SIZE]
        self._output.close()

    def kill_all(self) -> None:
        """Kill every process of its session."""
        for _ in range(10):  # somebody may have forked meanwhile
            members = session_members(self.process.pid)
            if not members:
                break
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
        self.line.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class PythonKernel:
    """The ipykernel of this machine.

    Args:
        folder: for folders of its sockets.
        preload: modules that are imported before it counts as ready.
        user: whose process it is; None leaves it to the agent's own user (local runs).
        on_up: called in another thread with the folder of the sockets, when ipykernel takes requests. The kernel counts as ready when
            this returns.
        on_ended: called in another thread when it ends by itself, with {"exit_code", "signal", "restarting", "log"}.
        restarts: start it again when it ends by itself, up to three times a minute.
    """

    def __init__(
        self,
        folder: Path,
        preload: Sequence[str],
        user: str | None,
        *,
        on_up: Callable[[Path], None],
        on_ended: Callable[[dict[str, Any]], None],
        restarts: bool = False,
    ) -> None:
        self._folder = folder
        self._preload = tuple(preload)
        self._user = pwd.getpwnam(user) if user else None
        self._on_up = on_up
        self._on_ended = on_ended
        self._restarts = restarts
        self._restarted: list[float] = []
        self._starts = 0
        self._given: dict[str, str] = {}
        self._run: _Run | None = None
        self._changing = threading.RLock()  # held while one process is replaced by another
        self._changed = threading.Condition()
        self._talking = threading.Lock()

    def start(self, environment: dict[str, str] | None = None) -> dict[str, Any]:
        """Start it and return at once; `wait` tells when it is ready.

        Args:
            environment: variables for it beside those that it has anyway; they hold for later restarts too.

        Raises:
            RpcError: it runs already, or these are no variables.
        """
        given = {} if environment is None else environment
        if not isinstance(given, dict) or not all(map(_is_variable, given.items())):
            raise RpcError("an environment maps names to strings", code=INVALID_PARAMS)
        with self._changing:
            if self._run is not None and not self._run.ended:
                raise RpcError("the Python kernel runs already")
            if environment is not None:
                self._given = dict(given)
            self._spawn()
        return {}

    def wait(self) -> dict[str, Any]:
        """Wait until it takes requests; return {"failed_preload": {module: error}}.

        Raises:
            RpcError: it ended instead, or took too long.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._run is None or self._run.ready or self._run.ended, START_TIMEOUT_S)
            run = self._run
        if run is None:
            raise RpcError("the Python kernel was not started")
        if run.ended:
            raise RpcError(f"the Python kernel ended (exit code {run.process.returncode})", data={"log": run.log})
        if not run.ready:
            raise RpcError(f"the Python kernel was not ready within {START_TIMEOUT_S:g} s", data={"log": run.log})
        return {"failed_preload": run.failed_preload}

    def interrupt(self) -> dict[str, Any]:
        """Send SIGINT to it and its children, as ipykernel does for interrupt_request; nothing runs before it is ready."""
        run = self._run
        if run is None or run.ended:
            raise RpcError("there is no Python kernel to interrupt")
        if run.ready:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGINT)
        return {}

    def restart(self) -> dict[str, Any]:
        """End it with everything in its session and start it anew."""
        with self._changing:
            if self._run is not None:
                self._run.kill_all()
            self._spawn()
        return self.wait()

    def status(self) -> dict[str, Any]:
        """Whether it runs and is ready, its process id, its connection file, and how many were started."""
        run = self._run
        running = run is not None and not run.ended
        return {
            "running": running,
            "ready": run is not None and run.ready and running,
            "pid": run.process.pid if run is not None else None,
            "connection_file": str(run.folder / "connection.json") if run is not None else None,
            "starts": self._starts,
        }

    @contextlib.contextmanager
    def reseeding(self, seed: bytes, *, clone: bool) -> Iterator[None]:
        """Seed the generators in the kernel process; at the end of the context it has said that they are.

        That process has a CPU of its own for it where there is one.

        Args:
            seed: what from.
            clone: also `random` and `numpy.random`, which a user may have seeded.

        Raises:
            RpcError: it did not confirm; the machine must not be handed out.
        """
        self.wait()
        run = self._run
        if run is None:
            raise RpcError("there is no Python kernel to reseed")
        with self._talking:
            try:
                run.line.settimeout(RESEED_TIMEOUT_S)
                run.line.sendall(json.dumps({"reseed": seed.hex(), "clone": clone}).encode() + b"\n")
            except OSError as error:
                raise _not_confirmed(error) from error
            try:
                yield
            finally:
                try:
                    answer = json.loads(run.answers.readline(4096))
                except (OSError, ValueError) as error:
                    raise _not_confirmed(error) from error
        if not isinstance(answer, dict) or answer.get("reseeded") is not True:
            raise RpcError("the Python kernel could not be reseeded")

    def kill(self) -> None:
        """End it and every process of its session."""
        with self._changing:
            run, self._run = self._run, None
            if run is not None:
                run.kill_all()
            self._tell_waiters()

    # ---- the process

    def _tell_waiters(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _spawn(self) -> None:
        self._starts += 1
        folder = self._folder / str(self._starts)
        folder.mkdir(mode=0o700, parents=True)
        settings = {
            "transport": "ipc",
            "ip": str(folder / "k"),
            **PORTS,
            "key": "",  # Unix sockets that only the user and root get at; on the way to the host others vouch for the frames
            "signature_scheme": "hmac-sha256",
        }
        connection_file = folder / "connection.json"
        connection_file.write_text(json.dumps(settings))
        who: dict[str, Any] = {}
        if self._user:
            user = self._user
            self._folder.chmod(0o711)
            os.chown(connection_file, user.pw_uid, user.pw_gid)
            os.chown(folder, user.pw_uid, user.pw_gid)
            groups = os.getgrouplist(user.pw_name, user.pw_gid)
            who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": groups, "cwd": user.pw_dir}
        ours, theirs = socket.socketpair()
        # As in ipykernel's own kernelspec: with frozen modules the debugger misses breakpoints, and says so in the first cell.
        command = [sys.executable, "-Xfrozen_modules=off", str(LAUNCHER), str(theirs.fileno()), str(connection_file)]
        with theirs:
            # Its own session: an interrupt reaches the kernel and its children, and nothing else.
            process = subprocess.Popen(
                [*command, *self._preload], pass_fds=(theirs.fileno(),), start_new_session=True,
                env=self._environment(os.environ), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                **who,
            )  # fmt: skip
        self._run = _Run(process, ours, folder)
        threading.Thread(target=self._watch, args=(self._run,), daemon=True).start()

    def _environment(self, ours: Mapping[str, str]) -> dict[str, str]:
        hidden = ("PYTHON", "JUPYTER", "JPY_", "AGENTVM")
        kept = {name: value for name, value in ours.items() if not name.startswith(hidden)}
        kept.setdefault("LANG", "C.UTF-8")
        if self._user:
            home = self._user.pw_dir
            kept |= {
                "HOME": home,
                "USER": self._user.pw_name,
                "LOGNAME": self._user.pw_name,
                "SHELL": self._user.pw_shell,
            }
        # As a kernel of Jupyter's finds it: figures show inline, tools may write colours.
        kept |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "TERM": "xterm-color", "PAGER": "cat"}
        return kept | self._given

    def _watch(self, run: _Run) -> None:
        """Wait for the launcher's word that it is ready, then for its end."""
        try:
            run.failed_preload = _failed_preload(json.loads(run.answers.readline(65536)))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # it ended first, which is what we wait for now
        else:
            self._on_up(run.folder)
            run.ready = True
            self._tell_waiters()
        code = run.process.wait()
        run.finish_log()
        with self._changing:
            if run is not self._run:
                return  # we killed it ourselves
            restarting = self._restarts and run.ready and self._may_restart()
            run.kill_all()
            if restarting:
                self._spawn()
            else:
                run.ended = True
            self._tell_waiters()
        self._on_ended(
            {
                "exit_code": code if code >= 0 else None,
                "signal": -code if code < 0 else None,
                "restarting": restarting,
                "log": run.log[-2000:],
            }
        )

    def _may_restart(self) -> bool:
        now = time.monotonic()
        self._restarted = [when for when in self._restarted if now - when < RESTART_PERIOD_S]
        if len(self._restarted) >= RESTARTS:
            return False
        self._restarted.append(now)
        return True


def _not_confirmed(error: Exception) -> RpcError:
    return RpcError(f"the Python kernel did not confirm its new seeds: {error}")


def _is_variable(item: tuple[str, Any]) -> bool:
    name, value = item
    return bool(name) and isinstance(value, str) and "=" not in name and "\0" not in name + value


def _failed_preload(hello: dict[str, Any]) -> dict[str, str]:
    failed = hello["failed"]
    return (
        {str(name): str(text)[:1000] for name, text in list(failed.items())[:100]} if isinstance(failed, dict) else {}
    )


def session_members(session: int) -> list[int]:
    """Return the ids of all processes of a session, but zombies."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                # proc(5): the command's name is in parentheses and may hold anything; state, ppid, pgrp, session follow it.
                with open(f"/proc/{entry.name}/stat", "rb") as stat:
                    fields = stat.read().rpartition(b")")[2].split()
                if int(fields[3]) == session and fields[0] not in (b"Z", b"X"):
                    found.append(int(entry.name))
    return found
