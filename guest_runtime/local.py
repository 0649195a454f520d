"""The agent, its bridge and ipykernel as ordinary local processes on a Unix socket. Isolates nothing.

For benchmarks and for tests of the proxy only: `python -m guest_runtime.local --socket PATH --secret-file FILE`. It cannot renew an
identity or shut anything down, and ends with its parent.
"""

import argparse
import ctypes
import os
import signal
import sys
import tempfile
from pathlib import Path

from guest_runtime import pipes
from guest_runtime.agent import Agent
from guest_runtime.kernel import PythonKernel

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until SIGTERM comes or the parent process ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="where to listen")
    parser.add_argument("--secret-file", type=Path, required=True, help="holds what a client has to know")
    parser.add_argument("--preload", nargs="*", default=[], help="modules to import first")
    arguments = parser.parse_args()
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the parent is gone already")
    with tempfile.TemporaryDirectory(prefix="agentvm-k-") as folder:
        agent = Agent(
            arguments.secret_file.read_bytes(),
            lambda on_ended: PythonKernel(Path(folder), arguments.preload, None, on_ended),
        )
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            agent.kernel.start()
            agent.add_listener(pipes.listen_unix(arguments.socket))
            agent.run()
        finally:
            agent.kernel.kill()


if __name__ == "__main__":
    main()
