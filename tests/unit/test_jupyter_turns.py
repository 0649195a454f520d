"""The order among cells that the guest runs and cells that the host runs."""

import json

import pytest
from proxy_world import World

from agentvm_kernel.errors import MachineLost
from agentvm_kernel.sandbox.settings import CellLimits
from guest_runtime.wire import Channel

OK = {"status": "ok", "execution_count": 1, "payload": [], "user_expressions": {}}
FAILED = {"status": "error", "execution_count": 1, "ename": "E", "evalue": "v", "traceback": []}


@pytest.fixture
def world():
    return World().attach()


def codes(world):
    """What the guest was asked to run since the last call."""
    taken, world.guest.received = world.guest.received, []
    return [json.loads(parts[3]).get("code") for _, parts in taken]


def ids(world):
    return [json.loads(parts[0])["msg_id"] for _, parts in world.guest.received]


def answer(world, asked, content=OK):
    world.guest.say_status(asked, "busy")
    world.guest.say(Channel.SHELL, "execute_reply", asked, content)
    world.guest.say_status(asked, "idle")


def replies(world, asked):
    return [m.content["status"] for m in world.outlet.take() if m.channel == "shell" and m.parent == asked]


def test_a_host_cell_begins_when_what_was_before_it_is_done(world):
    first = world.execute("x = 1")
    world.execute("%snapshot a")
    assert not world.owner.cells
    answer(world, first)
    (cell,) = world.owner.cells
    assert cell.content["code"] == "%snapshot a"


def test_what_comes_after_waits_until_it_has_ended(world):
    world.execute("%snapshot a")
    world.execute("x = 2")
    world.ask("complete_request", {"code": "x", "cursor_pos": 1})
    world.ask("comm_msg", {"comm_id": "c", "data": {}})
    assert codes(world) == []
    world.proxy.end_cell(world.owner.cells[0], dict(OK), None)
    assert codes(world) == ["x = 2", "x", None]


def test_control_and_subshells_go_past(world):
    world.execute("%snapshot a")
    world.ask("debug_request", {}, channel="control")
    world.ask("execute_request", {"code": "on a subshell"}, subshell_id="s1")
    assert codes(world) == [None, "on a subshell"]
    assert world.proxy.others_in_guest()


def test_nothing_passes_while_the_machine_stands_still(world):
    world.execute("%snapshot a")
    world.proxy.stand_still(True)
    world.ask("debug_request", {}, channel="control")
    assert codes(world) == []
    world.proxy.stand_still(False)
    assert codes(world) == [None]


def test_an_error_before_it_aborts_it_and_what_follows(world):
    first = world.execute("1/0")
    second = world.execute("%snapshot a")
    third = world.execute("x")
    asked = world.ask("complete_request", {"code": "x", "cursor_pos": 1})
    answer(world, first, FAILED)
    assert not world.owner.cells
    statuses = [(m.parent, m.content["status"]) for m in world.outlet.take() if m.type == "execute_reply"]
    assert statuses == [(first, "error"), (second, "aborted"), (third, "aborted")]
    assert ids(world)[1:] == [asked]


def test_an_error_that_shall_not_stop_others_does_not(world):
    first = world.execute("1/0", stop_on_error=False)
    world.execute("%snapshot a")
    answer(world, first, FAILED)
    assert len(world.owner.cells) == 1


def test_its_own_error_aborts_what_waits(world):
    world.execute("%snapshot a")
    second = world.execute("x")
    world.proxy.end_cell(world.owner.cells[0], dict(FAILED), None)
    assert replies(world, second) == ["aborted"]
    assert codes(world) == []


def test_parts_are_one_cell_to_the_client(world):
    asked = world.execute("a\n%snapshot b\nc"[2:])
    (cell,) = world.owner.cells
    world.proxy.show_input(cell)
    done = []
    world.proxy.run_part(cell, {"code": "a"}, {"m": 1}, done.append)
    ((channel, parts),) = world.guest.received
    assert (channel, json.loads(parts[3]), json.loads(parts[2])) == (Channel.SHELL, {"code": "a"}, {"m": 1})
    part = json.loads(parts[0])["msg_id"]
    assert part != asked
    world.guest.say_status(part, "busy")
    world.guest.say(Channel.IOPUB, "execute_input", part, {"code": "a", "execution_count": 1})
    world.guest.say(Channel.IOPUB, "stream", part, {"name": "stdout", "text": "hi"})
    world.guest.say(Channel.SHELL, "execute_reply", part, {**OK, "execution_count": 4})
    assert not done, "not before all output has come"
    world.guest.say(Channel.IOPUB, "stream", part, {"name": "stdout", "text": "last"})
    world.guest.say_status(part, "idle")
    assert done[0].content["execution_count"] == 4
    assert world.proxy.next_count == 5
    world.proxy.end_cell(cell, dict(OK), done[0])
    messages = world.outlet.take()
    assert {m.parent for m in messages} == {asked}
    assert [m.type for m in messages] == ["status", "execute_input", "stream", "stream", "execute_reply", "status"]
    assert messages[1].content == {"code": "%snapshot b\nc", "execution_count": 1}
    assert not world.proxy.dropped
    # A thread that the part has started may go on printing.
    world.guest.say(Channel.IOPUB, "stream", part, {"name": "stdout", "text": "late"})
    assert world.take() == [("iopub", "stream", asked)]


def test_input_in_a_part_reaches_the_client_of_the_cell(world):
    world.execute("%snapshot a")
    (cell,) = world.owner.cells
    world.proxy.run_part(cell, {"code": "input()"}, {}, lambda result: None)
    (part,) = ids(world)
    world.outlet.take()
    world.guest.say(Channel.STDIN, "input_request", part, {"prompt": "? "})
    (question,) = world.outlet.take()
    assert (question.channel, question.identities) == ("stdin", [b"client"])
    world.guest.received = []
    world.ask("input_reply", {"value": "1"}, channel="stdin")
    assert [channel for channel, _ in world.guest.received] == [Channel.STDIN]


def test_a_lost_machine_ends_the_part_and_the_host_answers_the_cell(world):
    asked = world.execute("%snapshot a")
    (cell,) = world.owner.cells
    done = []
    world.proxy.run_part(cell, {"code": "x"}, {}, done.append)
    waiting = world.execute("y")
    lost = MachineLost("It is gone.")
    world.proxy.detach(lost)
    assert done == [lost]
    assert replies(world, waiting) == ["error"]
    world.proxy.run_part(cell, {"code": "x"}, {}, done.append)
    assert isinstance(done[1], MachineLost)
    world.proxy.end_cell(cell, dict(FAILED), None)
    assert replies(world, asked) == ["error"]


def test_a_cell_is_left_to_the_guest_as_it_came(world):
    world.proxy.plans_all = True
    world.owner.plan_cell = lambda code: []
    asked = world.execute("x  = 1")
    (cell,) = world.owner.cells
    assert codes(world) == []
    world.proxy.release_cell()
    assert (ids(world), codes(world)) == ([asked], ["x  = 1"])
    world.execute("y")
    assert len(world.owner.cells) == 1, "the next one waits for it"
    answer(world, asked)
    assert len(world.owner.cells) == 2
    assert cell is world.owner.cells[0]


def test_silent_cells_are_not_asked_about(world):
    world.proxy.plans_all = True
    world.owner.plan_cell = lambda code: []
    world.execute("x", silent=True)
    world.execute("y", store_history=False)
    assert codes(world) == ["x", "y"]


def test_a_cell_left_to_the_guest_whose_machine_has_gone_waits_for_the_next(world):
    world.proxy.plans_all = True
    world.owner.plan_cell = lambda code: []
    asked = world.execute("x")
    world.proxy.detach(MachineLost("gone"))
    world.proxy.release_cell()
    assert world.owner.wanted == 1
    world.attach()
    assert ids(world) == [asked]


def test_a_cell_waits_for_the_machine_and_then_for_its_turn():
    world = World()
    world.execute("x")
    world.execute("%snapshot a")
    world.execute("y")
    world.attach()
    assert codes(world) == ["x"]
    assert not world.owner.cells


def test_switching_machines_ends_what_the_old_one_was_asked(world):
    asked = world.ask("debug_request", {}, channel="control")
    world.execute("%snapshot a")
    old, world.guest = world.guest, type(world.guest)()
    world.proxy.switch(world.guest)
    assert not old.on_message
    assert [
        (m.type, m.content["status"]) for m in world.outlet.take() if m.parent == asked and m.channel == "control"
    ] == [("debug_reply", "error")]
    world.proxy.end_cell(world.owner.cells[0], dict(OK), None)
    world.execute("x")
    assert codes(world) == ["x"]


def test_interrupting_reaches_the_host(world):
    world.execute("%snapshot a")
    waiting = world.execute("x")
    world.ask("interrupt_request", channel="control")
    assert world.owner.cell_interrupts == 1
    assert replies(world, waiting) == [], "what waits is aborted only when the cell fails"


def test_completion_of_a_magic_is_answered_here(world):
    asked = world.ask("complete_request", {"code": "%restore ", "cursor_pos": 9})
    assert codes(world) == []
    assert [m.content.get("matches") for m in world.outlet.take() if m.parent == asked and m.channel == "shell"] == [
        ["a"]
    ]
    world.ask("complete_request", {"code": "%restore  + x", "cursor_pos": 13})
    assert codes(world) == ["%restore  + x"]


def test_a_machine_is_not_parked_before_the_last_word_of_a_cell(world):
    asked = world.execute("x")
    world.guest.say_status(asked, "busy")
    world.guest.say(Channel.SHELL, "execute_reply", asked, OK)
    assert not world.proxy.park()
    world.guest.say_status(asked, "idle")
    assert world.proxy.park()
    world.execute("y")
    assert world.owner.wanted == 1
    world.attach()
    assert codes(world) == ["x", "y"]


# ---- what a cell may use up


def test_a_cell_that_runs_too_long_is_interrupted_and_says_why(world):
    world.proxy.guard.limits = CellLimits(timeout_s=5)
    asked = world.execute("while True: pass")
    world.guest.say_status(asked, "busy")
    world.owner.later()
    assert world.owner.interrupts == 1
    assert "5 s, which is the limit" in world.outlet.take()[-1].content["text"]
    error = {"ename": "KeyboardInterrupt", "evalue": "", "traceback": ["where"]}
    world.guest.say(Channel.IOPUB, "error", asked, error)
    world.guest.say(Channel.SHELL, "execute_reply", asked, {**FAILED, **error})
    shown, reply = world.outlet.take()
    for message in (shown, reply):
        assert message.content["ename"] == "CellTimeout"
        assert message.content["evalue"].startswith("The cell ran longer than 5 s.")
        assert message.content["traceback"][0] == "where"
    world.owner.later()
    assert not world.owner.ended


def test_a_cell_that_does_not_react_costs_its_python_process(world):
    world.proxy.guard.limits = CellLimits(timeout_s=5)
    world.guest.say_status(world.execute("stubborn"), "busy")
    world.owner.later()
    world.owner.later()
    (error,) = world.owner.ended
    assert "5 s" in str(error)


def test_a_cell_that_ends_in_time_is_left_alone(world):
    world.proxy.guard.limits = CellLimits(timeout_s=5)
    answer(world, world.execute("quick"))
    world.owner.later()
    assert not world.owner.interrupts


def test_output_is_cut_off_at_the_cap_and_errors_are_not(world):
    world.proxy.guard.limits = CellLimits(output_bytes=1000)
    asked = world.execute("print")
    world.guest.say_status(asked, "busy")
    world.take()
    for _ in range(3):
        world.guest.say(Channel.IOPUB, "stream", asked, {"name": "stdout", "text": "x" * 600})
    world.guest.say(Channel.IOPUB, "display_data", asked, {"data": {"text/plain": "no"}, "metadata": {}})
    world.guest.say(Channel.IOPUB, "error", asked, {"ename": "E", "evalue": "v", "traceback": []})
    first, second, word, error = world.outlet.take()
    assert len(first.content["text"]) == 600
    assert 300 < len(second.content["text"]) < 600
    assert "cut off here, at 1000 bytes" in word.content["text"]
    assert error.type == "error"
    world.guest.say_status(asked, "idle")
    following = world.execute("print")
    world.guest.say(Channel.IOPUB, "stream", following, {"name": "stdout", "text": "again"})
    assert world.outlet.take()[-1].content["text"] == "again"
