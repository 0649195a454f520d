"""What the kernel says about itself: what ipykernel says for Python, so that every frontend treats it as that.

Imports nothing heavy.
"""

import platform
from typing import Any

from agentvm_kernel import __version__

IPYKERNEL_PROTOCOL_VERSION = "5.3"
OLDEST_IPYTHON_VERSION = "9.0"


def kernel_info(python_version: str = "", ipython_version: str = "") -> dict[str, Any]:
    """Return the content of a kernel_info_reply.

    Args:
        python_version: of the guest; while that is not known, the host's.
        ipython_version: of the guest; while that is not known, the oldest one that guests have.
    """
    version = python_version or platform.python_version()
    return {
        "status": "ok",
        "protocol_version": IPYKERNEL_PROTOCOL_VERSION,
        "implementation": "ipython",
        "implementation_version": ipython_version or OLDEST_IPYTHON_VERSION,
        "language_info": {
            "name": "python",
            "version": version,
            "mimetype": "text/x-python",
            "codemirror_mode": {"name": "ipython", "version": 3},
            "pygments_lexer": "ipython3",
            "nbconvert_exporter": "python",
            "file_extension": ".py",
        },
        "banner": f"Python {version} in a virtual machine of its own (agentvm {__version__})\n",
        "help_links": [
            {"text": "Python Reference", "url": f"https://docs.python.org/{'.'.join(version.split('.')[:2])}"},
            {"text": "IPython Reference", "url": "https://ipython.readthedocs.io/en/stable/"},
            {"text": "NumPy Reference", "url": "https://docs.scipy.org/doc/numpy/reference/"},
            {"text": "SciPy Reference", "url": "https://docs.scipy.org/doc/scipy/reference/"},
            {"text": "Matplotlib Reference", "url": "https://matplotlib.org/contents.html"},
            {"text": "SymPy Reference", "url": "http://docs.sympy.org/latest/index.html"},
            {"text": "pandas Reference", "url": "https://pandas.pydata.org/pandas-docs/stable/"},
        ],
        "supported_features": ["kernel subshells", "debugger"],
    }
