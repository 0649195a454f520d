"""The guest side of agentvm, and the home of the wire format that both ends speak.

Standard library and what ipykernel brings (pyzmq); never anything of agentvm_kernel.
"""

__version__ = "0.1.0"
