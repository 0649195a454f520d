"""`python -m agentvm_kernel -f CONNECTION_FILE`: the kernel process that Jupyter starts."""

import sys

from agentvm_kernel.sandbox import head_start


def run() -> int:
    """Run a kernel; return the exit code of the process."""
    begun = head_start.begin()
    # Only now: it imports most of what there is, while the machine is on its way.
    from agentvm_kernel.jupyter.kernel_app import main

    return main(head_start=begun)


if __name__ == "__main__":
    sys.exit(run())
