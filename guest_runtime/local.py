"""The agent, its bridge and ipykernel as ordinary local processes on a Unix socket. Isolates nothing.

For benchmarks and for tests of the proxy only: `python -m guest_runtime.local --socket PATH --secret-file FILE`. It has no method that
changes a machine (renew, shutdown, reboot). It ends, with its ipykernel and what that has started, on SIGTERM, with its parent, and
when its standard input ends where that is a pipe.
"""

import argparse
import os
import signal
import stat
import sys
import tempfile
from pathlib import Path

from guest_runtime import pipes
from guest_runtime.agent import Agent
from guest_runtime.kernel import PythonKernel


def main() -> None:
    """Serve until told to end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="where to listen")
    parser.add_argument("--secret-file", type=Path, required=True, help="holds what a client has to know")
    parser.add_argument("--connection-dir", type=Path, help="for ipykernel's sockets; a temporary folder otherwise")
    parser.add_argument("--preload", nargs="*", default=[], help="modules to import first")
    parser.add_argument("--restart-kernel", action="store_true", help="start ipykernel again when it ends by itself")
    parser.add_argument(
        "--parent", type=int, help="process that this one ends with, by its id; otherwise whoever started it"
    )
    arguments = parser.parse_args()
    # Under asyncio a parent thread may be short-lived, which rules PR_SET_PDEATHSIG out.
    parent = os.pidfd_open(os.getppid())
    if arguments.parent not in (None, os.getppid()):
        sys.exit(f"agentvm: process {arguments.parent}, which started this runtime, is gone")
    with tempfile.TemporaryDirectory(prefix="agentvm-k-") as temporary:
        agent = Agent(
            arguments.secret_file.read_bytes(),
            lambda on_up, on_ended: PythonKernel(
                arguments.connection_dir or Path(temporary),
                arguments.preload,
                None,
                on_up=on_up,
                on_ended=on_ended,
                restarts=arguments.restart_kernel,
            ),
        )
        # Left to the loop: an exception raised wherever the signal arrives may be swallowed there, as in a finaliser.
        signal.signal(signal.SIGTERM, lambda *_: agent.call_soon(sys.exit))
        agent.watch(parent, sys.exit)
        if stat.S_ISFIFO(os.fstat(0).st_mode) or stat.S_ISSOCK(os.fstat(0).st_mode):
            agent.watch(0, _on_input)
        print("agentvm: a local runtime, for benchmarks and tests only; it isolates nothing", file=sys.stderr)
        try:
            agent.kernel.start()
            agent.add_listener(pipes.listen_unix(arguments.socket))
            agent.run()
        finally:
            agent.kernel.kill()


def _on_input() -> None:
    os.set_blocking(0, False)
    try:
        while os.read(0, 4096):
            pass
    except BlockingIOError:
        return
    sys.exit(0)


if __name__ == "__main__":
    main()
