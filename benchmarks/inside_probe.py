"""Runs inside the guest: asks the guest's own ipykernel over its own sockets, without any of our path. Knows nothing of agentvm.

`python inside_probe.py CONNECTION_FILE ANSWERS`; each line on standard input is a JSON list [number, code, count, size]. It runs the code
`count` times and writes the seconds of each, or with a size the MB/s of what was printed, to the file ANSWERS/number.
"""

import json
import os
import sys
import time
from collections.abc import Iterator

from jupyter_client.blocking.client import BlockingKernelClient as Client

WAIT_S = 300


def texts(client: Client, asked: str) -> Iterator[str]:
    while True:
        message = client.get_iopub_msg(timeout=WAIT_S)
        if message["parent_header"].get("msg_id") != asked:
            continue
        if message["msg_type"] == "stream":
            yield message["content"]["text"]
        elif message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
            return


def reply(client: Client, asked: str) -> None:
    while client.get_shell_msg(timeout=WAIT_S)["parent_header"].get("msg_id") != asked:
        pass


def cells(client: Client, code: str, count: int) -> list[float]:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        asked = client.execute(code)
        reply(client, asked)
        for _ in texts(client, asked):
            pass
        times.append(time.perf_counter() - began)
    return times


def printed(client: Client, code: str, size: int) -> list[float]:
    began = time.perf_counter()
    asked = client.execute(code)
    received = sum(map(len, texts(client, asked)))
    elapsed = time.perf_counter() - began
    reply(client, asked)
    assert received == size, f"{received} of {size} characters arrived"
    return [size / 1e6 / elapsed]


def measure(connection_file: str, code: str, count: int, size: int) -> list[float]:
    # A second subscriber would slow down what is measured from outside: this one stays only as long as it is needed.
    client = Client(connection_file=connection_file)
    client.load_connection_file()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=WAIT_S)
        if size:
            return printed(client, code, size)
        cells(client, code, 3)
        return cells(client, code, count)
    finally:
        client.stop_channels()


def main() -> None:
    connection_file, folder = sys.argv[1:]
    for line in sys.stdin:
        number, code, count, size = json.loads(line)
        answer = measure(connection_file, code, count, size)
        with open(f"{folder}/new", "w") as file:
            json.dump(answer, file)
        os.rename(f"{folder}/new", f"{folder}/{number}")


if __name__ == "__main__":
    main()
