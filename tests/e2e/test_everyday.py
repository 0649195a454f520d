"""What people do in a notebook all day, in a real machine: complete, draw, watch progress, interrupt everything, restart."""

import base64
import time
from collections.abc import Iterator
from typing import Any

import pytest
from test_machine_kernel import BOOT_S, Notebook, notebook, wait_until

pytestmark = [pytest.mark.guest, pytest.mark.slow]

# Under emulation; a minute each where the template is not warm.
SOON_S = 15


@pytest.fixture(scope="module")
def nb() -> Iterator[Notebook]:
    with notebook() as started:
        started.run("pass", timeout_s=BOOT_S)
        yield started


def messages(nb: Notebook, code: str, *, timeout_s: float = 120) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a cell; return its reply's content and what was published about it."""
    published: list[dict[str, Any]] = []
    reply = nb.client.execute_interactive(code, timeout=timeout_s, output_hook=published.append, allow_stdin=False)
    return reply["content"], published


def reply_to(nb: Notebook, asked: str, *, timeout_s: float = 120) -> dict[str, Any]:
    while (message := nb.client.get_shell_msg(timeout=timeout_s))["parent_header"].get("msg_id") != asked:
        pass
    content: dict[str, Any] = message["content"]
    return content


def test_a_new_machine_completes_inspects_and_explains_errors_at_once(nb: Notebook) -> None:
    began = time.monotonic()
    content = reply_to(nb, nb.client.complete("import itertools; itertools.chai", 32))
    assert content["matches"] == ["chain"]
    assert reply_to(nb, nb.client.inspect("zip", 3))["found"]
    assert reply_to(nb, nb.client.execute("1/0"))["ename"] == "ZeroDivisionError"
    assert time.monotonic() - began < SOON_S


def test_figures_are_shown_inline(nb: Notebook) -> None:
    reply, published = messages(nb, "import matplotlib.pyplot as plt\nplt.plot([1, 4, 9])\nplt.title('squares');")
    assert reply["status"] == "ok"
    (shown,) = (message["content"]["data"] for message in published if message["msg_type"] == "display_data")
    png = base64.b64decode(shown["image/png"])
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(png) > 5000
    assert shown["text/plain"].startswith("<Figure size")


def test_progress_bars_move_while_the_cell_runs(nb: Notebook) -> None:
    code = "import time\nfrom tqdm import tqdm\nfor number in tqdm(range(4), mininterval=0): time.sleep(0.5)"
    asked = nb.client.execute(code)
    arrived: dict[str, float] = {}
    while True:
        message = nb.client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") != asked:
            continue
        if message["msg_type"] == "stream":
            assert message["content"]["name"] == "stderr"
            for step in ("0/4", "2/4", "4/4"):
                if step in message["content"]["text"]:
                    arrived.setdefault(step, time.monotonic())
        elif message["content"].get("execution_state") == "idle":
            break
    assert list(arrived) == ["0/4", "2/4", "4/4"]
    assert arrived["4/4"] - arrived["2/4"] > 0.3
    assert reply_to(nb, asked)["status"] == "ok"


def test_progress_bars_as_widgets(nb: Notebook) -> None:
    reply, published = messages(nb, "from tqdm.notebook import tqdm\nfor number in tqdm(range(3)): pass")
    assert reply["status"] == "ok"
    opened = {
        message["content"]["comm_id"]: message["content"] for message in published if message["msg_type"] == "comm_open"
    }
    models = {content["data"]["state"]["_model_name"] for content in opened.values()}
    assert {"FloatProgressModel", "HBoxModel", "HTMLModel"} <= models
    views = [message["content"]["data"] for message in published if message["msg_type"] == "display_data"]
    assert views[0]["application/vnd.jupyter.widget-view+json"]["model_id"] in opened
    values = [
        message["content"]["data"]["state"]["value"]
        for message in published
        if message["msg_type"] == "comm_msg" and "value" in message["content"]["data"].get("state", {})
    ]
    assert 3 in values


def test_interrupting_a_notebook_that_runs_ends_all_of_its_cells(nb: Notebook) -> None:
    nb.run("done = []")
    running = nb.client.execute("done.append(1)\nprint('running', flush=True)\nimport time\ntime.sleep(600)")
    queued = [nb.client.execute(f"done.append({number})") for number in (2, 3, 4)]
    while (message := nb.client.get_iopub_msg(timeout=60))["content"].get("text") != "running\n":
        pass
    assert message["parent_header"]["msg_id"] == running
    nb.manager.interrupt_kernel()
    assert reply_to(nb, running, timeout_s=30)["ename"] == "KeyboardInterrupt"
    assert [reply_to(nb, asked, timeout_s=30)["status"] for asked in queued] == ["aborted"] * 3
    assert nb.run("print(done)")[1] == "[1]\n"


def test_a_restart_gives_a_fresh_machine_and_removes_the_old_one() -> None:
    with notebook() as nb:
        nb.run("mine = 1; open('mine.txt', 'w').close()", timeout_s=BOOT_S)
        _, old = nb.machine()
        nb.manager.restart_kernel()
        nb.client.wait_for_ready(timeout=60)
        reply, shown = nb.run("import os; print('mine' in globals(), os.path.exists('mine.txt'))", timeout_s=BOOT_S)
        assert reply["execution_count"] == 1
        assert shown.endswith("False False\n")
        _, new = nb.machine()
        assert new != old
        wait_until(lambda: not old.exists())
