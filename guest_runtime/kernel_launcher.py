"""Runs inside the Python kernel's process: starts ipykernel, and reseeds its generators when the agent asks.

The agent starts it as `python kernel_launcher.py FD CONNECTION_FILE [MODULE …]`. FD is a socket to the agent that carries lines of
JSON: we say {"ready": true, "failed": {module: error}} when ipykernel can take requests; {"reseed": HEX} asks for fresh seeds and is
answered with {"reseeded": true}. The user's code runs in this process, so nothing that comes from it is trusted by anyone.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import warnings


def _reseed(seed: bytes) -> None:
    """Seed `random` and `numpy.random`, each differently, from what the host gave."""
    import random

    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        words = [int.from_bytes(seed[at : at + 4], "big") for at in range(0, len(seed) - 3, 4)]
        numpy.random.seed(words)


def _serve(agent: socket.socket) -> None:
    with agent.makefile("r") as lines:
        for line in lines:
            request = json.loads(line)
            try:
                _reseed(bytes.fromhex(request["reseed"]))
            except Exception:
                agent.sendall(b'{"reseeded": false}\n')
            else:
                agent.sendall(b'{"reseeded": true}\n')


def main() -> None:
    """Start ipykernel and stay in its loop until it ends."""
    agent = socket.socket(fileno=int(sys.argv[1]))
    agent.set_inheritable(False)
    # The agent is exempt from the out-of-memory killer; the user's code is not.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("0")
    connection_file = sys.argv[2]
    modules = sys.argv[3:]
    # As `python -m ipykernel_launcher` does: the working directory comes first, this script's folder not at all.
    sys.path[0] = ""
    sys.argv = ["ipykernel_launcher.py", "-f", connection_file]
    warnings.filterwarnings("ignore", message=".*signing is disabled.*")

    from ipykernel.kernelapp import IPKernelApp

    failed = {}
    for name in modules:
        try:
            __import__(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    app = IPKernelApp.instance()
    app.initialize(["-f", connection_file])  # type: ignore[no-untyped-call]
    threading.Thread(target=_serve, args=(agent,), name="agentvm-reseed", daemon=True).start()
    agent.sendall(json.dumps({"ready": True, "failed": failed}).encode() + b"\n")
    with contextlib.suppress(KeyboardInterrupt):
        app.start()  # type: ignore[no-untyped-call]
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
