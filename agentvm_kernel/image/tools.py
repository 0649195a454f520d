"""Runs the tools of an image build: their output is followed, their failure is an error that says what they said last."""

import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from agentvm_kernel.errors import ImageError

_KEPT_LINES = 12
# In a PID namespace everything that a tool starts ends with it, and in a mount namespace so does what it mounts; and the
# tool ends with this process, however that ends.
_JAIL = ("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc")
_OUT_OF_SPACE = "No space left on device"


class ToolError(ImageError):
    """A tool of the build failed."""


def run(
    command: Sequence[str],
    *,
    cwd: Path,
    hint: str,
    name: str = "",
    on_line: Callable[[str], None] = lambda line: None,
    environment: Mapping[str, str] | None = None,
    accept: Sequence[int] = (0,),
) -> str:
    """Run a tool to its end and return the end of its output.

    Args:
        command: program and arguments.
        cwd: folder to run in, never the user's: neither pip nor Python may find anything there.
        hint: what to do when it fails.
        name: what to call it in messages; by default the program's name.
        on_line: told every line that it prints.
        environment: variables beside those of this process.
        accept: exit codes that are no failure.

    Raises:
        ToolError: it failed, or the disk was full.
    """
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    full = False
    with subprocess.Popen(
        [*_JAIL, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C.UTF-8", **(environment or {})},
        cwd=cwd,
        umask=0o022,
        start_new_session=True,  # or ctrl-C would reach the tool as well
    ) as process:
        try:
            for line in map(str.strip, process.stdout or ()):
                if line:
                    last.append(line)
                    full = full or _OUT_OF_SPACE in line
                    on_line(line)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if full:
        hint = f"The disk is full: free some space for {cwd.parent} and try again."
    if full or code not in accept:
        said = "".join(f"\n  {line}" for line in last)
        raise ToolError(f"{name or Path(command[0]).name} failed with exit code {code}. It said:{said}\n", hint=hint)
    return "\n".join(last)


def chroot(
    root: Path, command: Sequence[str], hint: str, *, user: tuple[int, str] | None = None, accept: Sequence[int] = (0,)
) -> str:
    """Run a program of the guest's root file system, shut in so that it sees nothing of the host: its files,
    processes and network.

    Args:
        root: the guest's root file system.
        command: program and arguments, as seen in the guest.
        hint: what to do when it fails.
        user: id (of user and group) and home folder; root when missing.
        accept: exit codes that are no failure.

    Returns:
        The end of its output.

    Raises:
        ToolError: it failed.
    """
    user_id, home = user or (0, "/root")
    clean = ["env", "-i", f"HOME={home}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]
    who = [f"--userspec={user_id}:{user_id}", "--groups="]
    inside = ["unshare", "--net", "--ipc", "--uts", "chroot", *who, str(root), *clean, *command]
    return run(inside, cwd=root.parent, hint=hint, name=f"{command[0]} (in the guest)", accept=accept)


@contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM and SIGHUP interrupt a build as ctrl-C does, so that it cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
