"""Real sockets: binding, connection files, heartbeat, bursts."""

import asyncio
import json
import socket
import stat
from dataclasses import replace

import pytest
import zmq
import zmq.asyncio

from agentvm_kernel.errors import ConfigError, HostError
from agentvm_kernel.jupyter import connection_file
from agentvm_kernel.jupyter.connection_file import CHANNELS, ConnectionInfo
from agentvm_kernel.jupyter.sockets import ClientSockets


@pytest.fixture(params=["tcp", "ipc"])
def info(request, tmp_path):
    return ConnectionInfo(transport=request.param, ip="127.0.0.1" if request.param == "tcp" else str(tmp_path / "k"))


@pytest.fixture
def context():
    context = zmq.asyncio.Context()
    yield context
    context.destroy(linger=0)


def connect(context, sockets, channel, kind):
    client = context.socket(kind)
    client.linger = 0
    client.connect(sockets.info.url(channel))
    return client


def test_ports_that_are_0_are_chosen(info):
    sockets = ClientSockets(info)
    ports = list(sockets.info.ports().values())
    assert all(ports)
    assert len(set(ports)) == 5
    sockets.close()


def test_a_taken_tcp_port_is_an_error_that_names_it():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=rf"{port} \(iopub\).*in use"):
            ClientSockets(ConnectionInfo(iopub_port=port))


async def test_a_client_that_comes_before_zeromq_is_served_once_that_is_there(context):
    first = ClientSockets(ConnectionInfo())
    info = first.info
    first.close()
    listening = connection_file.listen(info)
    assert set(listening) == set(CHANNELS)
    early = context.socket(zmq.DEALER)
    early.linger = 0
    early.connect(info.url("shell"))
    await early.send_multipart([b"early"])
    sockets = ClientSockets(info, listening)
    arrived = asyncio.get_running_loop().create_future()
    sockets.start(lambda channel, frames: arrived.set_result((channel, frames[1:])), lambda topic: None)
    assert await asyncio.wait_for(arrived, 5) == ("shell", [b"early"])
    sockets.close()


def test_where_nobody_can_listen_early_it_is_left_to_zeromq(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert connection_file.listen(ConnectionInfo(shell_port=taken.getsockname()[1])) == {}
    assert connection_file.listen(ConnectionInfo(transport="ipc", ip=str(tmp_path / "k"), shell_port=1)) == {}
    assert connection_file.listen(ConnectionInfo(ip="no address", shell_port=1)) == {}


def test_a_restarted_kernel_binds_the_same_ports(info):
    first = ClientSockets(info)
    first.close()
    second = ClientSockets(first.info)
    assert second.info == first.info
    second.close()


async def test_heartbeat_answers_while_the_loop_is_blocked(info):
    sockets = ClientSockets(info)
    with zmq.Context() as context, context.socket(zmq.REQ) as client:
        client.linger = 0
        client.rcvtimeo = 5000
        client.connect(sockets.info.url("hb"))
        for beat in (b"1", b"2"):
            client.send(beat)
            assert client.recv() == beat
    sockets.close()


async def test_messages_of_a_burst_all_arrive_and_are_answered(info, context):
    """Edge-triggered descriptors lose messages when a send in between eats the edge."""
    sockets = ClientSockets(info)
    sockets.start(lambda channel, frames: sockets.send(channel, frames), lambda topic: None)
    clients = {channel: connect(context, sockets, channel, zmq.DEALER) for channel in ("shell", "control", "stdin")}
    count = 500

    async def talk(client):
        for number in range(count):
            await client.send(b"%d" % number)
        return [int(await client.recv()) for _ in range(count)]

    async with asyncio.timeout(30):
        for answers in await asyncio.gather(*map(talk, clients.values())):
            assert answers == list(range(count))
    sockets.close()


async def test_a_paused_channel_keeps_its_messages(info, context):
    sockets = ClientSockets(info)
    received = asyncio.Queue()
    sockets.start(lambda channel, frames: received.put_nowait((channel, frames[1])), lambda topic: None)
    sockets.pause("shell", True)
    shell, control = (connect(context, sockets, channel, zmq.DEALER) for channel in ("shell", "control"))
    await shell.send(b"later")
    await control.send(b"now")
    async with asyncio.timeout(10):
        assert await received.get() == ("control", b"now")
        sockets.pause("shell", False)
        assert await received.get() == ("shell", b"later")
    sockets.close()


async def test_every_subscriber_is_announced(info, context):
    sockets = ClientSockets(info)
    topics = asyncio.Queue()
    sockets.start(lambda channel, frames: None, topics.put_nowait)
    subscribers = [connect(context, sockets, "iopub", zmq.SUB) for _ in range(2)]
    async with asyncio.timeout(10):
        for subscriber in subscribers:
            subscriber.subscribe(b"")
            assert await topics.get() == b""
        sockets.publish([b"topic", b"message"])
        for subscriber in subscribers:
            assert await subscriber.recv_multipart() == [b"topic", b"message"]
    sockets.close()


async def test_counts_what_waits_for_a_subscriber_that_does_not_read(info, context):
    sockets = ClientSockets(info)
    subscribed = asyncio.Event()
    sockets.start(lambda channel, frames: None, lambda topic: subscribed.set())
    subscriber = connect(context, sockets, "iopub", zmq.SUB)
    subscriber.rcvhwm = 1
    subscriber.subscribe(b"")
    async with asyncio.timeout(10):
        await subscribed.wait()
        message = [b"topic", b"x" * 1_000_000, memoryview(b"y" * 100_000), b"short"]
        for _ in range(50):
            sockets.publish(message)
        assert 20_000_000 < sockets.backlog() <= 50 * 1_100_000
        for _ in range(50):
            assert list(map(len, await subscriber.recv_multipart())) == [5, 1_000_000, 100_000, 5]
        while sockets.backlog():
            await asyncio.sleep(0.01)
    sockets.close()


async def test_curve_keeps_clients_without_the_key_out(info, context):
    public, secret = zmq.curve_keypair()
    sockets = ClientSockets(replace(info, curve_publickey=public.decode(), curve_secretkey=secret.decode()))
    sockets.start(lambda channel, frames: sockets.send(channel, frames), lambda topic: None)
    stranger = connect(context, sockets, "shell", zmq.DEALER)
    await stranger.send(b"hello")
    friend = context.socket(zmq.DEALER)
    friend.linger = 0
    friend.curve_publickey, friend.curve_secretkey = zmq.curve_keypair()
    friend.curve_serverkey = public
    friend.connect(sockets.info.url("shell"))
    await friend.send(b"hello")
    async with asyncio.timeout(10):
        assert await friend.recv() == b"hello"
    assert not await stranger.poll(50)
    sockets.close()


# ---- connection files


def test_reads_what_jupyter_client_writes(tmp_path):
    from jupyter_client.connect import write_connection_file

    path, _ = write_connection_file(str(tmp_path / "kernel-1.json"), key=b"k", ip="127.0.0.1")
    info = connection_file.load(tmp_path / "kernel-1.json")
    values = json.loads((tmp_path / "kernel-1.json").read_text())
    assert info.ports() == {f"{channel}_port": values[f"{channel}_port"] for channel in CHANNELS}
    assert (info.key, info.ip, info.transport) == ("k", "127.0.0.1", "tcp")
    assert path


def test_jupyter_client_reads_what_we_write(tmp_path):
    from jupyter_client import BlockingKernelClient

    info = connection_file.new_info().with_port("shell", 1234)
    connection_file.save(tmp_path / "new" / "kernel-2.json", info)
    client = BlockingKernelClient(connection_file=str(tmp_path / "new" / "kernel-2.json"))
    client.load_connection_file()
    assert client.shell_port == 1234
    assert client.session.key == info.key.encode()
    assert stat.S_IMODE((tmp_path / "new" / "kernel-2.json").stat().st_mode) == 0o600


def test_saving_keeps_what_the_client_wrote(tmp_path):
    path = tmp_path / "k.json"
    path.write_text(json.dumps({"kernel_name": "agentvm", "jupyter_session": "/n.ipynb", "shell_port": 0}))
    connection_file.save(path, ConnectionInfo(shell_port=5))
    values = json.loads(path.read_text())
    assert values["shell_port"] == 5
    assert values["kernel_name"] == "agentvm"
    assert "curve_secretkey" not in values


def test_ipc_without_an_ip_lies_beside_the_file(tmp_path):
    path = tmp_path / "kernel-3.json"
    path.write_text(json.dumps({"transport": "ipc", "key": ""}))
    assert connection_file.load(path).ip == str(tmp_path / "kernel-3-ipc")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"transport": "udp"}', '{"shell_port": "5000"}', '{"shell_port": 70000}', '{"hb_port": -1}'],
)
def test_unusable_files_are_named(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.json"):
        connection_file.load(path)


def test_runtime_dir_is_jupyters(monkeypatch, tmp_path):
    from jupyter_core.paths import jupyter_runtime_dir

    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(connection_file.runtime_dir()) == jupyter_runtime_dir()
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    assert str(connection_file.runtime_dir()) == jupyter_runtime_dir()
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "run"))
    assert str(connection_file.runtime_dir()) == jupyter_runtime_dir()
