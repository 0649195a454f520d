"""The proxy's rules, with a guest that says what the test wants and a client that is jupyter_client's own Session."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from proxy_world import Guest, World

from agentvm_kernel.errors import BootError, MachineLost
from agentvm_kernel.jupyter.output_valve import LIMIT, STALL_S
from agentvm_kernel.jupyter.requests import MAX_ANSWERED
from guest_runtime.wire import Channel


@pytest.fixture
def world():
    return World().attach()


@pytest.fixture
def waiting():
    """A world without a machine yet."""
    return World()


def states(messages):
    return [message.content["execution_state"] for message in messages if message.type == "status"]


def test_a_cell_goes_there_and_back(world):
    asked = world.execute("x = 'ä'")
    ((channel, parts),) = world.guest.received
    assert channel == Channel.SHELL
    assert json.loads(parts[0])["msg_id"] == asked
    assert json.loads(parts[3])["code"] == "x = 'ä'"
    world.guest.say_status(asked, "busy")
    world.guest.say(Channel.IOPUB, "execute_input", asked, {"code": "something else", "execution_count": 7})
    world.guest.say(Channel.IOPUB, "stream", asked, {"name": "stdout", "text": "hi\n"})
    world.guest.say(
        Channel.SHELL, "execute_reply", asked, {"status": "ok", "execution_count": 7, "payload": []}, {"started": "now"}
    )
    world.guest.say_status(asked, "idle")
    messages = world.outlet.take()
    assert [(m.channel, m.type) for m in messages] == [
        ("iopub", "status"),
        ("iopub", "execute_input"),
        ("iopub", "stream"),
        ("shell", "execute_reply"),
        ("iopub", "status"),
    ]
    assert {m.parent for m in messages} == {asked}
    assert messages[1].content == {"code": "x = 'ä'", "execution_count": 7}
    assert messages[2].topic == "stream.stdout"
    assert messages[3].identities == [b"client"]
    assert messages[3].metadata == {"started": "now"}
    assert not world.proxy.dropped


def test_the_guest_never_sees_identities_or_signatures(world):
    world.ask("execute_request", {"code": ""}, identity=b"secret-identity")
    ((_, parts),) = world.guest.received
    assert len(parts) == 4
    assert not any(b"secret-identity" in part for part in parts)


def test_buffers_pass_both_ways(world):
    asked = world.ask("comm_msg", {"comm_id": "c", "data": {}}, buffers=[b"\x00up"])
    assert world.guest.received[-1][1][4:] == [b"\x00up"]
    world.guest.say(Channel.IOPUB, "comm_msg", asked, {"comm_id": "c", "data": {}}, buffers=[memoryview(b"down"), b""])
    assert world.outlet.take()[-1].buffers == [b"down", b""]


def test_a_reply_nobody_waits_for_is_dropped(world):
    asked = world.execute()
    reply = {"status": "ok", "execution_count": 1}
    world.guest.say(Channel.SHELL, "execute_reply", "forged", reply)
    world.guest.say(Channel.SHELL, "complete_reply", asked, reply)
    world.guest.say(Channel.CONTROL, "execute_reply", asked, reply)
    assert world.take() == []
    world.guest.say(Channel.SHELL, "execute_reply", asked, reply)
    world.guest.say(Channel.SHELL, "execute_reply", asked, reply)
    assert world.take() == [("shell", "execute_reply", asked)]
    assert world.proxy.dropped == {"guest shell": 3, "guest control": 1}


def test_output_of_an_unknown_request_is_dropped(world):
    world.guest.say(Channel.IOPUB, "stream", "never asked", {"name": "stdout", "text": "x"})
    assert world.take() == []
    assert world.proxy.dropped == {"guest iopub": 1}


def test_messages_without_a_parent_are_not_for_anybody(world):
    world.guest.say(Channel.IOPUB, "status", {}, {"execution_state": "starting"})
    world.guest.say(Channel.IOPUB, "iopub_welcome", {}, {"subscription": ""})
    assert world.take() == []
    assert not world.proxy.dropped


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("2026-11-21T08:44:34.535899Z", "2026-11-21T08:44:34.535899+00:00"),
        ("2026-11-21T08:44:34+02:00", "2026-11-21T08:44:34+02:00"),
        ("2026-11-21T08:44:34", None),
        ("0001-01-01T00:00:00+14:00", None),
        ("9999-99-99T00:00:00Z", None),
        ("<script>", None),
        (17, None),
        (None, None),
    ],
)
def test_only_sensible_dates_of_the_guest_are_passed_on(world, given, shown):
    asked = world.execute()
    header = {"msg_type": "stream", "date": given}
    world.guest.say(Channel.IOPUB, "stream", asked, {"name": "stdout", "text": ""}, header=header)
    date = world.outlet.last_header["date"]
    now = datetime.now(UTC)
    assert date == datetime.fromisoformat(shown) if shown else abs(now - date) < timedelta(minutes=1)


def test_threads_of_a_finished_cell_may_still_print(world):
    asked = world.execute()
    world.guest.say(Channel.SHELL, "execute_reply", asked, {"status": "ok", "execution_count": 1})
    world.outlet.take()
    world.guest.say(Channel.IOPUB, "stream", asked, {"name": "stdout", "text": "late"})
    assert world.take() == [("iopub", "stream", asked)]


def test_execute_input_comes_once_and_may_come_after_the_reply(world):
    asked = world.execute("the code")
    world.guest.say(Channel.SHELL, "execute_reply", asked, {"status": "ok", "execution_count": 1})
    for _ in range(2):
        world.guest.say(Channel.IOPUB, "execute_input", asked, {"code": "", "execution_count": 1})
    assert [m.content["code"] for m in world.outlet.take() if m.type == "execute_input"] == ["the code"]
    completion = world.ask("complete_request")
    world.guest.say(Channel.IOPUB, "execute_input", completion, {"code": "", "execution_count": 1})
    assert world.take() == []


def test_the_table_of_answered_requests_is_bounded(world):
    first = world.execute()
    world.guest.say(Channel.SHELL, "execute_reply", first, {"status": "ok", "execution_count": 1})
    for _ in range(MAX_ANSWERED):
        world.ask("comm_msg", {"comm_id": "c", "data": {}})
    world.outlet.take()
    world.guest.say(Channel.IOPUB, "stream", first, {"name": "stdout", "text": "too late"})
    assert world.take() == []


def test_busy_and_idle_come_once_each_and_in_order(world):
    asked = world.execute()
    for state in ("idle", "busy", "busy", "idle", "idle", "busy"):
        world.guest.say_status(asked, state)
    assert states(world.outlet.take()) == ["busy", "idle"]


@pytest.mark.parametrize("state", ["starting", "restarting", "dead", 7, None])
def test_only_the_host_says_how_the_kernel_is(world, state):
    asked = world.execute()
    world.guest.say_status(asked, state)
    assert world.take() == []
    assert world.proxy.dropped == {"guest iopub": 1}


@pytest.mark.parametrize(
    ("msg_type", "content"),
    [
        ("kernel_info_reply", {"status": "ok"}),
        ("shutdown_reply", {"status": "ok", "restart": True}),
        ("input_request", {"prompt": ""}),
        ("made_up", {}),
        ("stream", {"name": "stdlog", "text": ""}),
        ("stream", {"name": "stdout", "text": ["x"]}),
        ("stream", b"[]"),
        ("stream", b'{"name": "stdout", "text": NaN}'),
        ("stream", b'{"name": "stdout"'),
        ("display_data", {"data": "text", "metadata": {}}),
        ("display_data", {"data": {}, "metadata": []}),
        ("display_data", {"data": {}, "metadata": {}, "transient": {"display_id": 5}}),
        ("execute_result", {"data": {}, "metadata": {}, "execution_count": "1"}),
        ("error", {"ename": "E", "evalue": "v", "traceback": "text"}),
        ("comm_open", {"comm_id": "c", "data": {}}),
        ("comm_msg", {"comm_id": 1, "data": {}}),
        ("comm_msg", {"comm_id": "c", "data": []}),
        ("execute_input", {"code": "x", "execution_count": {}}),
    ],
)
def test_iopub_messages_of_the_wrong_shape_are_dropped(world, msg_type, content):
    asked = world.execute()
    world.guest.say(Channel.IOPUB, msg_type, asked, content)
    assert world.take() == []
    assert world.proxy.dropped == {"guest iopub": 1}


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"status": "fine"},
        {"status": "ok", "execution_count": "1"},
        {"status": "ok", "payload": {"source": "page"}},
        {"status": "ok", "user_expressions": []},
        {"status": "error", "ename": 1, "evalue": "", "traceback": []},
    ],
)
def test_execute_replies_of_the_wrong_shape_are_dropped(world, content):
    asked = world.execute()
    world.guest.say(Channel.SHELL, "execute_reply", asked, content)
    assert world.take() == []


@pytest.mark.parametrize("parts", [[], [b"{}"] * 3, [b"{}"] * 2000, [b"x", b'{"msg_id":"a"}', b"{}", b"{}"]])
def test_guest_messages_with_impossible_parts_are_dropped(world, parts):
    for handler in world.guest.on_message.values():
        handler(parts)
    assert world.take() == []
    assert sum(world.proxy.dropped.values()) == 4


def test_target_module_is_stripped_from_comms(world):
    asked = world.execute()
    world.guest.say(
        Channel.IOPUB, "comm_open", asked, {"comm_id": "c", "target_name": "t", "target_module": "evil", "data": {}}
    )
    assert "target_module" not in world.outlet.take()[-1].content


def test_unknown_requests_of_clients_are_dropped_but_do_not_leave_it_busy(world):
    world.ask("made_up_request")
    world.ask("create_subshell_request", channel="shell")
    assert world.guest.received == []
    assert states(world.outlet.take()) == ["busy", "idle", "busy", "idle"]
    assert world.proxy.dropped == {"client shell": 2}


def test_unsigned_messages_are_dropped(world):
    world.proxy.on_client_message("shell", [b"id", b"<IDS|MSG>", b"", b"{}", b"{}", b"{}", b"{}"])
    assert world.guest.received == []
    assert world.proxy.dropped == {"client shell": 1}


@pytest.mark.parametrize("msg_type", ["debug_request", "usage_request", "create_subshell_request", "execute_request"])
def test_control_requests_are_answered_on_control(world, msg_type):
    asked = world.ask(msg_type, {"code": ""}, channel="control")
    assert world.guest.received[0][0] == Channel.CONTROL
    world.guest.say(Channel.CONTROL, msg_type.replace("request", "reply"), asked, {"status": "ok"})
    assert world.take() == [("control", msg_type.replace("request", "reply"), asked)]


def test_subshell_id_reaches_the_guest(world):
    world.ask("execute_request", {"code": ""}, subshell_id="s-1")
    assert json.loads(world.guest.received[0][1][0])["subshell_id"] == "s-1"


# ---- answered by the host


def test_kernel_info_is_answered_at_once_without_a_machine(waiting):
    asked = waiting.ask("kernel_info_request")
    messages = waiting.outlet.take()
    assert [(m.channel, m.type, m.parent) for m in messages] == [
        ("iopub", "status", asked),
        ("shell", "kernel_info_reply", asked),
        ("iopub", "status", asked),
    ]
    content = messages[1].content
    assert content["language_info"]["name"] == "python"
    assert {"debugger", "kernel subshells"} <= set(content["supported_features"])
    assert waiting.owner.wanted == 0


def test_kernel_info_tells_the_guests_version(world):
    world.ask("kernel_info_request", channel="control")
    reply = world.outlet.take()[1]
    assert reply.channel == "control"
    assert reply.content["language_info"]["version"] == "3.11.2"


def replies(world):
    return [m.type for m in world.outlet.take() if m.channel == "shell"]


def test_kernel_info_waits_for_its_turn(world):
    asked = world.execute("1")
    world.ask("kernel_info_request")
    assert replies(world) == []
    world.guest.say(Channel.SHELL, "execute_reply", asked, {"status": "ok", "execution_count": 1})
    assert replies(world) == ["execute_reply", "kernel_info_reply"]
    world.owner.later()
    assert replies(world) == []


def test_kernel_info_does_not_wait_for_a_long_cell(world):
    world.execute("while True: pass")
    world.ask("kernel_info_request")
    world.owner.later()
    assert replies(world) == ["kernel_info_reply"]


def test_kernel_info_is_answered_when_the_machine_is_lost(world):
    world.execute("while True: pass")
    world.ask("kernel_info_request")
    world.proxy.detach(MachineLost("gone"))
    assert replies(world) == ["execute_reply", "kernel_info_reply"]


def test_connect_request_tells_the_ports(world):
    world.ask("connect_request")
    assert world.outlet.take()[1].content == {
        "status": "ok", "shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5,
    }  # fmt: skip


def test_interrupt_is_a_call_to_the_runtime(world):
    asked = world.ask("interrupt_request", channel="control")
    assert world.owner.interrupts == 1
    assert world.guest.received == []
    assert ("control", "interrupt_reply", asked) in world.take()


@pytest.mark.parametrize("restart", [True, False])
def test_shutdown_is_answered_first(world, restart):
    asked = world.ask("shutdown_request", {"restart": restart}, channel="control")
    messages = world.outlet.take()
    assert ("control", "shutdown_reply") in [(m.channel, m.type) for m in messages]
    assert ("iopub", "shutdown_reply") in [(m.channel, m.type) for m in messages]
    assert all(m.content["restart"] is restart for m in messages if m.type == "shutdown_reply" and m.parent == asked)
    assert world.owner.shutdowns == 1


def test_subscribers_are_welcomed(world):
    world.proxy.on_subscribe(b"")
    world.proxy.on_subscribe(b"topic")
    first, starting, second = world.outlet.take()
    assert states([starting]) == ["starting"]
    assert (first.type, first.content, first.identities) == ("iopub_welcome", {"subscription": ""}, [])
    assert (second.content, second.identities) == ({"subscription": "topic"}, [b"topic"])
    world.execute()
    world.proxy.on_subscribe(b"")
    assert states(world.outlet.take()) == []


# ---- clients that do not read


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("agentvm_kernel.jupyter.output_valve.time.monotonic", lambda: now[0])
    return now


def print_something(world):
    asked = world.execute("print(1)")
    world.guest.say(Channel.IOPUB, "stream", asked, {"name": "stdout", "text": "1"})


def test_the_guest_waits_for_clients_that_do_not_read(world, clock):
    world.outlet.waiting = LIMIT
    print_something(world)
    assert not world.guest.paused
    world.outlet.waiting = LIMIT + 1
    print_something(world)
    assert world.guest.paused == {Channel.IOPUB}
    for waiting in (LIMIT, LIMIT // 2 + 1):
        clock[0] += STALL_S
        world.outlet.waiting = waiting
        world.owner.later()
        assert world.guest.paused
    world.outlet.waiting = LIMIT // 2
    world.owner.later()
    assert not world.guest.paused


def test_one_client_that_never_reads_does_not_stop_the_others_for_ever(world, clock):
    world.outlet.waiting = LIMIT + 1
    print_something(world)
    clock[0] += STALL_S + 1
    world.owner.later()
    assert not world.guest.paused
    print_something(world)
    assert not world.guest.paused
    world.outlet.waiting = 2 * LIMIT + 2
    print_something(world)
    assert world.guest.paused


def test_a_fresh_machine_does_not_wait_for_the_output_of_a_lost_one(world):
    world.outlet.waiting = LIMIT + 1
    print_something(world)
    look_again = world.owner.later
    world.proxy.detach(MachineLost("gone"))
    old, world.guest = world.guest, Guest()
    world.attach()
    print_something(world)
    look_again()
    assert world.guest.paused
    assert old.paused


# ---- input


def test_input_goes_to_the_client_that_runs_the_cell(world):
    asked = world.ask("execute_request", {"code": "input()", "allow_stdin": True}, identity=b"a")
    world.ask("execute_request", {"code": "", "allow_stdin": True}, identity=b"b")
    world.guest.say(Channel.STDIN, "input_request", asked, {"prompt": "? ", "password": True})
    question = world.outlet.take()[-1]
    assert (question.channel, question.type, question.identities) == ("stdin", "input_request", [b"a"])
    assert question.content == {"prompt": "? ", "password": True}
    world.guest.received.clear()
    world.ask("input_reply", {"value": "stranger"}, channel="stdin", identity=b"b")
    world.ask("input_reply", {"value": "mine"}, channel="stdin", identity=b"a")
    world.ask("input_reply", {"value": "again"}, channel="stdin", identity=b"a")
    ((channel, parts),) = world.guest.received
    assert channel == Channel.STDIN
    assert json.loads(parts[3]) == {"value": "mine"}
    assert world.proxy.dropped == {"client stdin": 2}


def test_completion_while_a_cell_asks_for_input(world):
    asked = world.execute("input()")
    world.guest.say(Channel.STDIN, "input_request", asked, {"prompt": ""})
    completion = world.ask("complete_request", {"code": "", "cursor_pos": 0})
    world.guest.say(Channel.SHELL, "complete_reply", completion, {"status": "ok", "matches": []})
    world.ask("input_reply", {"value": "x"}, channel="stdin")
    assert world.guest.received[-1][0] == Channel.STDIN


def test_input_is_refused_where_the_client_does_not_allow_it(world):
    forbidden = world.execute(allow_stdin=False)
    other = world.ask("complete_request", {"code": "", "cursor_pos": 0})
    for parent in (forbidden, other, "unknown"):
        world.guest.say(Channel.STDIN, "input_request", parent, {"prompt": ""})
    assert world.take() == []
    assert world.proxy.dropped == {"guest stdin": 3}


def test_an_answer_after_the_cell_has_ended_is_dropped(world):
    asked = world.execute("input()")
    world.guest.say(Channel.STDIN, "input_request", asked, {"prompt": ""})
    world.guest.say(Channel.SHELL, "execute_reply", asked, {"status": "aborted"})
    world.ask("input_reply", {"value": "late"}, channel="stdin")
    assert [channel for channel, _ in world.guest.received] == [Channel.SHELL]


# ---- no machine, machine lost


def test_requests_wait_for_the_machine_in_order(waiting):
    asked = [waiting.execute("a"), waiting.ask("history_request"), waiting.execute("b")]
    debug = waiting.ask("debug_request", channel="control")
    assert waiting.owner.wanted == 4
    assert states(waiting.outlet.take()) == ["busy"]
    waiting.attach()
    sent = [(channel, json.loads(parts[0])["msg_id"]) for channel, parts in waiting.guest.received]
    assert sent == [*((Channel.SHELL, msg_id) for msg_id in asked), (Channel.CONTROL, debug)]
    waiting.guest.say_status(asked[0], "busy")
    assert waiting.take() == []


def test_progress_is_shown_to_the_first_waiting_cell_and_removed(waiting):
    waiting.ask("history_request")
    silent = waiting.execute("s", silent=True)
    asked = waiting.execute("a")
    waiting.outlet.take()
    waiting.proxy.show_progress("booting")
    waiting.proxy.show_progress("booting")
    waiting.attach()
    begins = [("iopub", "status", asked), ("iopub", "execute_input", asked)]
    assert waiting.take() == [*begins, ("iopub", "stream", asked), ("iopub", "clear_output", asked)]
    waiting.guest.say_status(asked, "busy")
    waiting.guest.say(Channel.IOPUB, "execute_input", asked, {"code": "a", "execution_count": 1})
    assert waiting.take() == []
    assert silent


def test_every_cell_is_told_when_no_machine_can_be_had(waiting):
    first, second = waiting.execute("a"), waiting.execute("b")
    completion = waiting.ask("complete_request")
    comm = waiting.ask("comm_msg", {"comm_id": "c"})
    waiting.proxy.detach(BootError("No image.", hint="Run agentvm image build."))
    messages = waiting.outlet.take()
    for asked in (first, second):
        about = [m for m in messages if m.parent == asked]
        assert [m.type for m in about] == ["status", "error", "execute_reply", "status"]
        assert about[2].content["status"] == "error"
        assert about[2].content["ename"] == "BootError"
        assert about[2].content["evalue"] == "No image. Run agentvm image build."
        assert about[2].content["traceback"]
    assert [m.type for m in messages if m.parent == completion] == ["status", "complete_reply", "status"]
    assert not [m for m in messages if m.parent == comm]
    waiting.execute("again")
    assert waiting.owner.wanted == 5


def test_a_lost_machine_ends_what_it_was_doing_and_the_next_cell_is_told(world):
    asked = world.execute("while True: pass")
    comm = world.ask("comm_msg", {"comm_id": "c"})
    silent = world.execute("s", silent=True)
    world.guest.say_status(asked, "busy")
    world.guest.say_status(comm, "busy")
    world.outlet.take()
    world.proxy.detach(MachineLost("QEMU was killed."), notice="state was lost")
    assert world.take() == [
        ("iopub", "error", asked),
        ("shell", "execute_reply", asked),
        ("iopub", "status", asked),
        ("iopub", "status", silent),
        ("shell", "execute_reply", silent),
        ("iopub", "status", silent),
        ("iopub", "status", comm),
    ]
    world.execute("1")
    assert world.owner.wanted == 1
    world.guest = Guest()
    world.attach()
    messages = world.outlet.take()
    assert [m.content for m in messages if m.type == "stream"] == [{"name": "stderr", "text": "state was lost\n"}]
    world.execute("2")
    assert not [m for m in world.outlet.take() if m.type == "stream"]


def test_an_old_guest_cannot_speak_for_a_new_one(world):
    world.proxy.detach(MachineLost("gone"))
    assert world.guest.on_message == {}


def test_an_interrupt_waits_until_the_cell_runs(world):
    sent = []
    world.proxy.when_cell_runs(lambda: sent.append("idle"))
    asked = world.execute("1")
    world.proxy.when_cell_runs(lambda: sent.append("soon"))
    world.guest.say_status(asked, "busy")
    assert sent == ["idle"]
    world.guest.say(Channel.IOPUB, "execute_input", asked, {"code": "1", "execution_count": 1})
    assert sent == ["idle", "soon"]
    world.owner.later()
    world.proxy.when_cell_runs(lambda: sent.append("running"))
    assert sent == ["idle", "soon", "running"]


def test_an_interrupt_does_not_wait_for_long(world):
    sent = []
    world.execute("1", silent=True)
    world.proxy.when_cell_runs(lambda: sent.append("late"))
    world.owner.later()
    assert sent == ["late"]


def test_interrupting_cells_that_wait_for_a_machine(waiting):
    first, second = waiting.execute("a"), waiting.execute("b")
    history = waiting.ask("history_request")
    waiting.ask("interrupt_request", channel="control")
    replies = {m.parent: m.content for m in waiting.outlet.take() if m.type == "execute_reply"}
    assert replies[first]["ename"] == "KeyboardInterrupt"
    assert replies[first]["execution_count"] == 1  # required of every reply that is not aborted
    assert replies[second] == {"status": "aborted"}
    waiting.attach()
    assert [json.loads(parts[0])["msg_id"] for _, parts in waiting.guest.received] == [history]
