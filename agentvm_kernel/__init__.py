"""The host side of agentvm: a Jupyter kernel whose cells run in a virtual machine.

Imported by every kernel process before its first byte, so nothing is imported here: the Python API comes when it is asked for.
"""

__version__ = "0.1.0"
__all__ = ["Result", "Sandbox", "__version__"]


def __getattr__(name: str) -> object:
    if name in ("Sandbox", "Result"):
        from agentvm_kernel.sandbox import sandbox

        return getattr(sandbox, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
