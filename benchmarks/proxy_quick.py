"""The whole path with the runtime as a local process, against a bare ipykernel: a cell's round trip, and stdout's speed.

    python benchmarks/proxy_quick.py [--rounds N] [--cells N] [--megabytes N]

Both kernels run at once and take turns, so that whatever else the machine does hits both. Emulation would flatter the proxy;
this does not. The goals are `proxy_ratio` <= 1.25 and `proxy_stdout_ratio` >= 0.9.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from jupyter_client import BlockingKernelClient, KernelManager

from agentvm_kernel.jupyter import kernelspec

WARM_UP = 50


def round_trips(client: BlockingKernelClient, count: int) -> list[float]:
    """Seconds from sending a cell to its reply and its idle, each."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        asked = client.execute("x = 1")
        while client.get_shell_msg(timeout=30)["parent_header"].get("msg_id") != asked:
            pass
        wait_idle(client, asked)
        times.append(time.perf_counter() - began)
    return times


def wait_idle(client: BlockingKernelClient, asked: str) -> int:
    """Read iopub until the request is idle; return how much text came."""
    size = 0
    while True:
        message = client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") != asked:
            continue
        content = message["content"]
        if message["msg_type"] == "stream":
            size += len(content["text"])
        elif message["msg_type"] == "status" and content["execution_state"] == "idle":
            return size


def stdout_speed(client: BlockingKernelClient, megabytes: int) -> float:
    """MB/s of printed lines, seen by the client."""
    lines = megabytes * 10_000
    began = time.perf_counter()
    asked = client.execute(f"for _ in range({lines}): print('x' * 99)")
    size = wait_idle(client, asked)
    seconds = time.perf_counter() - began
    assert size == lines * 100, f"{size} of {lines * 100} bytes arrived"
    client.get_shell_msg(timeout=30)
    return size / 1e6 / seconds


def bulk_speed(client: BlockingKernelClient, megabytes: int) -> float:
    """MB/s of text printed in pieces of a megabyte."""
    began = time.perf_counter()
    asked = client.execute(f"for _ in range({megabytes}): print('x' * 999_999)")
    size = wait_idle(client, asked)
    seconds = time.perf_counter() - began
    client.get_shell_msg(timeout=30)
    return size / 1e6 / seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--megabytes", type=int, default=20)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    kernelspec.write(folder / "kernels" / "agentvm-local", "local", {"AGENTVM_LOCAL_RUNTIME": "1"})
    os.environ["JUPYTER_PATH"] = str(folder)
    kernels = {}
    for name in ("python3", "agentvm-local"):
        manager = KernelManager(kernel_name=name)
        manager.start_kernel()
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        kernels[name] = (manager, client)
    try:
        results: dict[str, dict[str, list[float]]] = {name: {} for name in kernels}
        for _, client in kernels.values():
            round_trips(client, WARM_UP)
        for _ in range(arguments.rounds):
            for name, (_, client) in kernels.items():
                runs = results[name]
                runs.setdefault("round trip ms", []).append(
                    statistics.median(round_trips(client, arguments.cells)) * 1000
                )
                runs.setdefault("stdout MB/s", []).append(stdout_speed(client, arguments.megabytes))
                runs.setdefault("bulk MB/s", []).append(bulk_speed(client, arguments.megabytes * 5))
    finally:
        for manager, client in kernels.values():
            client.stop_channels()
            manager.shutdown_kernel()
    for figure in results["python3"]:
        bare, ours = (results[name][figure] for name in kernels)
        ratios = [b / a for a, b in zip(bare, ours, strict=True)]
        print(
            f"{figure:14} bare {statistics.median(bare):8.2f}  ours {statistics.median(ours):8.2f}"
            f"  ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
