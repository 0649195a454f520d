"""The host side of agentvm: a Jupyter kernel whose cells run in a virtual machine.

Imported by every kernel process before its first byte, so nothing is imported here.
"""

__version__ = "0.1.0"
