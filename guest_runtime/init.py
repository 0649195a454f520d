"""PID 1 of a guest: mounts what is missing, starts the agent and keeps it running, reaps orphans, ends the machine cleanly.

SIGTERM switches off, SIGINT reboots (the kernel sends it for Ctrl-Alt-Del too). Standard library only, and little of it: this process
stays for ever.
"""

import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import sys
import time
import traceback
from pathlib import Path

from guest_runtime import identity
from guest_runtime.identity import mount

GRACE_S = 3.0
MAX_AGENT_STARTS = 5
AGENT_PERIOD_S = 60.0

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
# <linux/reboot.h>, for reboot(2)
_POWER_OFF, _RESTART = 0x4321FEDC, 0x01234567
_SIOCSIFFLAGS, _IFF_UP_RUNNING = 0x8914, 0x41

MOUNTS = (
    ("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, ""),
    ("sysfs", "/sys", "sysfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, ""),
    ("devtmpfs", "/dev", "devtmpfs", _MS_NOSUID, ""),
    ("devpts", "/dev/pts", "devpts", _MS_NOSUID | _MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=1777"),  # noqa: S108 (what POSIX shared memory uses)
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, ""),
)


def main() -> None:
    """Boot, then serve until a signal ends the machine."""
    try:
        _prepare()
    except Exception:
        _say(f"the guest could not be prepared:\n{traceback.format_exc()}")
        _end(_POWER_OFF)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
    starts = [time.monotonic()]
    agent = _start_agent()
    while True:
        signum = signal.sigwait({signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
        if signum != signal.SIGCHLD:
            _end(_POWER_OFF if signum == signal.SIGTERM else _RESTART)
        while (ended := _reap()) is not None:
            if ended != agent:
                continue
            starts = [start for start in starts if time.monotonic() - start < AGENT_PERIOD_S] + [time.monotonic()]
            if len(starts) > MAX_AGENT_STARTS:
                _say("the agent keeps ending; switching off")
                _end(_POWER_OFF)
            _say("the agent ended and is started again")
            agent = _start_agent()


def _prepare() -> None:
    for source, target, kind, flags, options in MOUNTS:
        if not os.path.ismount(target):
            Path(target).mkdir(exist_ok=True)
            mount(source, target, kind, flags, options)
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        link = Path("/dev", name)
        if not link.is_symlink():
            link.symlink_to(target)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", _IFF_UP_RUNNING))
    Path("/proc/sys/kernel/ctrl-alt-del").write_text("0")
    identity.prepare()
    socket.sethostname(json.loads(Path("/run/agentvm/boot.json").read_text()).get("hostname", "agentvm"))


def _start_agent() -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        os.setsid()
        # The machine is lost without it; when memory runs out, the user's processes have to go first.
        Path("/proc/self/oom_score_adj").write_text("-1000")
        os.execv(sys.executable, [sys.executable, "-P", "-m", "guest_runtime.agent"])  # noqa: S606 (no shell wanted)
    except BaseException:
        _say(f"the agent does not start:\n{traceback.format_exc()}")
    os._exit(1)


def _reap() -> int | None:
    """Collect one dead child and return its id; None when there is none."""
    try:
        pid, _ = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return pid or None


def _end(how: int) -> None:
    """Ask every process to end, then make them, write everything to disk, and leave."""
    for signum, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 1.0)):
        try:
            os.kill(-1, signum)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and _children_left():
            signal.sigtimedwait({signal.SIGCHLD}, 0.1)
    os.sync()
    try:
        mount("none", "/", "", _MS_REMOUNT | _MS_RDONLY)
    except OSError as error:
        _say(f"the root file system stays writable: {error}")
    ctypes.CDLL(None).reboot(how)
    os._exit(1)  # the kernel panics then, and QEMU ends


def _children_left() -> bool:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _say(text: str) -> None:
    with Path("/dev/console").open("w") as console:
        console.write(f"agentvm: {text}\n")


if __name__ == "__main__":
    main()
