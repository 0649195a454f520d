"""`python -m agentvm_kernel -f CONNECTION_FILE`: the kernel process that Jupyter starts."""

import sys

from agentvm_kernel.jupyter.kernel_app import main

if __name__ == "__main__":
    sys.exit(main())
