"""`python -m agentvm_kernel -f CONNECTION_FILE`: the kernel process that Jupyter starts.

Before all that it consists of is imported, clients can connect and a machine is on its way.
"""

import socket
import sys

from agentvm_kernel.errors import ConfigError
from agentvm_kernel.jupyter import connection_file


def run() -> int:
    """Run a kernel; return the exit code of the process."""
    listening = _listen()

    from agentvm_kernel.sandbox import head_start

    begun = head_start.begin()

    from agentvm_kernel.jupyter.kernel_app import main

    return main(head_start=begun, listening=listening)


def _listen() -> dict[str, socket.socket]:
    path = connection_file.parse_arguments(sys.argv[1:])
    if path is None or not path.exists():
        return {}
    try:
        return connection_file.listen(connection_file.load(path))
    except ConfigError:
        return {}  # whoever uses the file says what is wrong with it


if __name__ == "__main__":
    sys.exit(run())
