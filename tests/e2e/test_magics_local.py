"""Cells with host magics through a real client and a real ipykernel, with the runtime as a local process: all that needs no machine."""

import asyncio

import pytest
from test_proxy_local import TIMEOUT_S, kernel, spec, text  # noqa: F401 (fixtures)

pytestmark = pytest.mark.timeout(120)


async def test_a_cell_of_several_parts_is_one_cell(kernel):  # noqa: F811
    cell = "a = 20\na\n%vm timeout 60\nprint('then')\n%vm output off\na + 1"
    reply, outputs = await kernel.run(cell)
    assert reply["status"] == "ok"
    assert [kind for kind, _ in outputs] == ["execute_input", "stream", "stream", "stream", "execute_result"]
    assert outputs[0][1] == {"code": cell, "execution_count": reply["execution_count"]}
    assert text(outputs) == "Cell timeout: 60 s.\nthen\nOutput of a cell: no limit.\n"
    assert outputs[-1][1]["data"]["text/plain"] == "21"
    assert outputs[-1][1]["execution_count"] == reply["execution_count"]


async def test_counts_and_history_go_on_by_one_for_each_cell(kernel):  # noqa: F811
    counts = [
        (await kernel.run(cell))[0]["execution_count"]
        for cell in (
            "%vm timeout off",
            "x = 1\n%vm timeout off",
            "%vm timeout off\nx",
            "1/0\n%vm timeout off",
            "%vm nonsense",
            "x",
        )
    ]
    assert counts == list(range(counts[0], counts[0] + 6))
    _, outputs = await kernel.run("print(In[-6:-1])")
    assert "run_line_magic('vm', 'timeout off')" in text(outputs)


async def test_an_error_ends_the_cell_and_aborts_the_next(kernel):  # noqa: F811
    asked = kernel.client.execute("done = 1\n1/0\n%vm timeout 5\ndone = 2")
    following = kernel.client.execute("done = 3")
    reply, outputs = await kernel.result(asked)
    assert reply["ename"] == "ZeroDivisionError"
    assert not text(outputs)
    assert (await kernel.reply(following))["status"] == "aborted"
    _, outputs = await kernel.run("done")
    assert outputs[-1][1]["data"]["text/plain"] == "1"


async def test_input_works_in_the_parts(kernel):  # noqa: F811
    _, outputs = await kernel.run("print(input())\n%vm timeout off\nprint(input())", answers=["one", "two"])
    assert text(outputs) == "one\nCell timeout: none.\ntwo\n"


async def test_interrupting_a_part_ends_the_cell(kernel):  # noqa: F811
    asked = kernel.client.execute(
        "%vm timeout off\nprint('on', flush=True)\nimport time; time.sleep(600)\n%vm timeout 7"
    )
    while (await kernel.iopub(asked))["content"].get("text") != "on\n":
        pass
    await kernel.manager.interrupt_kernel()
    reply, outputs = await kernel.result(asked)
    assert reply["ename"] == "KeyboardInterrupt"
    assert "7 s" not in text(outputs)


async def test_what_needs_a_machine_says_so(kernel):  # noqa: F811
    for cell in ("%snapshot a", "%restore a", "%undo", "%%fork 2\nx", "%vm", "%vm pause", "%vm autocheckpoint on"):
        reply, _ = await kernel.run(cell)
        assert reply["status"] == "error", cell
        assert reply["ename"] in ("MachineError", "SnapshotError"), reply
        assert "machine" in reply["evalue"] or "no snapshot" in reply["evalue"], reply


async def test_inside_other_code_the_guest_explains_itself(kernel):  # noqa: F811
    for cell in ("for i in [1]:\n    %snapshot a", "x = %restore a", "%time %vm", "%%time\n%undo"):
        reply, outputs = await kernel.run(cell)
        assert reply["ename"] == "UsageError", cell
        assert "at the top level of a cell" in text(outputs, "stderr")
    reply, _ = await kernel.run("x = '''\n%snapshot a\n'''  # %restore\nlen(x)")
    assert reply["status"] == "ok"


async def test_a_fresh_python_takes_the_place_of_the_old(kernel):  # noqa: F811
    await kernel.run("x = 1")
    reply, outputs = await kernel.run("%vm restart\n'x' in globals()")
    assert reply["status"] == "ok"
    assert outputs[-1][1]["data"]["text/plain"] == "False"
    _, outputs = await kernel.run("y = 2; y")
    assert outputs[-1][1]["data"]["text/plain"] == "2"


async def test_a_cell_that_runs_too_long_is_interrupted(kernel):  # noqa: F811
    await kernel.run("%vm timeout 1")
    reply, outputs = await kernel.run("import time\nfor _ in range(6000): time.sleep(0.01)")
    assert reply["ename"] == "CellTimeout"
    assert "1 s, which is the limit" in text(outputs, "stderr")
    assert (await kernel.run("'alive'"))[0]["status"] == "ok"


async def test_values_of_variables_stand_in_the_line_but_bring_no_options(kernel):  # noqa: F811
    await kernel.run("seconds, trick = 90, '--delete'")
    _, outputs = await kernel.run("%vm timeout {seconds+1}")
    assert text(outputs) == "Cell timeout: 91 s.\n"
    for cell in ("%snapshot {trick}", "%snapshot {'a b'}", "%snapshot $unknown"):
        reply, _ = await kernel.run(cell)
        assert reply["status"] == "error"
        assert reply["ename"] in ("UsageError", "SnapshotError", "MachineError"), reply
    assert (await kernel.run("%snapshot {trick}"))[0]["ename"] == "UsageError"


async def test_completion_and_help(kernel):  # noqa: F811
    async with asyncio.timeout(TIMEOUT_S):
        reply = await kernel.reply(kernel.client.complete("%vm t"))
        assert reply["matches"] == ["timeout"]
        reply = await kernel.reply(kernel.client.complete("%snaps"))
        assert reply["matches"] == ["%snapshot"]
    reply, _ = await kernel.run("x = 1\n%%fork?\n%undo?")
    assert [page["data"]["text/plain"].split()[0] for page in reply["payload"]] == ["%%fork", "%undo"]
