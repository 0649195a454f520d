"""A proxy whose guest says what the test wants, with a client that is jupyter_client's own Session."""

import json
from collections import namedtuple

from jupyter_client.session import Session as ReferenceSession

from agentvm_kernel.jupyter.connection_file import ConnectionInfo
from agentvm_kernel.jupyter.proxy import Proxy
from agentvm_kernel.jupyter.wire import Session
from guest_runtime.wire import Channel

KEY = b"key"
Received = namedtuple("Received", "channel identities topic type parent metadata content buffers")


class Outlet:
    """Keeps what is sent to clients, read as a client would."""

    def __init__(self):
        self.info = ConnectionInfo(shell_port=1, iopub_port=2, stdin_port=3, control_port=4, hb_port=5)
        self.messages = []
        self.waiting = 0
        self._reader = ReferenceSession(key=KEY)

    def backlog(self):
        return self.waiting

    def send(self, channel, frames):
        self._record(channel, frames)

    def publish(self, frames):
        self._record("iopub", frames)

    def _record(self, channel, frames):
        identities, rest = self._reader.feed_identities([bytes(frame) for frame in frames])
        message = self._reader.deserialize(rest)
        self.last_header = message["header"]
        self.messages.append(
            Received(
                channel,
                identities,
                identities[0].decode() if channel == "iopub" and identities else "",
                message["msg_type"],
                message["parent_header"].get("msg_id"),
                message["metadata"],
                message["content"],
                [bytes(buffer) for buffer in message["buffers"]],
            )
        )

    def take(self):
        taken, self.messages = self.messages, []
        return taken


class Guest:
    """A connection whose other end is the test."""

    def __init__(self):
        self.ready = {"python": "3.11.2"}
        self.on_message = {}
        self.on_notification = None
        self.received = []
        self.paused = set()

    def pause(self, channel):
        self.paused.add(channel)

    def resume(self, channel):
        self.paused.remove(channel)

    def send(self, channel, parts):
        self.received.append((channel, [bytes(part) for part in parts]))

    def say(self, channel, msg_type, parent, content, metadata=None, buffers=(), header=None):
        parts = [
            json.dumps(header or {"msg_type": msg_type, "msg_id": "guest's own"}).encode(),
            json.dumps({"msg_id": parent} if isinstance(parent, str) else parent).encode(),
            json.dumps(metadata or {}).encode(),
            content if isinstance(content, bytes) else json.dumps(content).encode(),
            *buffers,
        ]
        self.on_message[channel](parts)

    def say_status(self, parent, state):
        self.say(Channel.IOPUB, "status", parent, {"execution_state": state})


class Owner:
    def __init__(self):
        self.wanted = self.interrupts = self.shutdowns = self.cell_interrupts = 0
        self.cells = []
        self.ended = []

    def machine_wanted(self):
        self.wanted += 1

    def interrupt(self, done):
        self.interrupts += 1
        done({"status": "ok"})

    def shutdown(self):
        self.shutdowns += 1

    def call_later(self, delay_s, callback):
        self.later = callback

    def plan_cell(self, code):
        return ["planned"] if code.startswith("%snapshot") else None

    def assist(self, msg_type, content):
        return {"status": "ok", "matches": ["a"]} if content["code"] == "%restore " else None

    def run_cell(self, request):
        self.cells.append(request)

    def interrupt_cell(self):
        self.cell_interrupts += 1

    def end_python(self, error):
        self.ended.append(error)


class World:
    def __init__(self):
        self.outlet, self.owner, self.guest = Outlet(), Owner(), Guest()
        self.proxy = Proxy(Session(KEY), self.outlet, self.owner)
        self.client = ReferenceSession(key=KEY)

    def attach(self):
        self.proxy.attach(self.guest)
        return self

    def ask(self, msg_type, content=None, channel="shell", identity=b"client", buffers=(), **header):
        message = self.client.msg(msg_type, content=content or {})
        message["header"].update(header)
        self.proxy.on_client_message(channel, [*self.client.serialize(message, ident=[identity]), *buffers])
        return message["header"]["msg_id"]

    def execute(self, code="1+1", **content):
        return self.ask("execute_request", {"code": code, "allow_stdin": True, **content})

    def take(self):
        """What clients were sent since the last call, as (channel, type, parent)."""
        return [(message.channel, message.type, message.parent) for message in self.outlet.take()]
