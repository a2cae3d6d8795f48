"""Node 0 and a second node over a real connection. A function of the test stands for a stage's processes."""

import contextlib
import dataclasses
import socket
import threading
import time

import pytest

from nemo_minitron.errors import DivergedError, InputError
from nemo_minitron.launch import connection as lines
from nemo_minitron.launch import machines
from nemo_minitron.launch.connection import Connection, ConnectionLost
from nemo_minitron.launch.machines import StageOrder, StageResult, follow_leader, lead, leading
from nemo_minitron.launch.nodes import Nodes

WORD = "a secret of this test"


@pytest.fixture
def hosts():
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return Nodes(2, 0, "127.0.0.1", port, WORD), Nodes(2, 1, "127.0.0.1", port, WORD)


def other(host, folder, work, identity="job"):
    """Runs the second node in a thread. Returns a function that waits for its end and gives its error."""
    errors = []

    def run():
        try:
            follow_leader(host, identity, folder, work)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def end():
        thread.join(60)
        assert not thread.is_alive()
        return errors[0] if errors else None

    return end


def noted(done):
    return lambda order, node, watch: done.append((order.stage, order.each, order.nodes, node)) or StageResult(0)


def test_each_node_does_its_part(hosts, tmp_path):
    here, there = [], []
    end = other(hosts[1], tmp_path / "run", noted(there))
    with lead(hosts[0], "job", tmp_path / "run"):
        for stage, processes in (("estimate", 4), ("prune", 1), ("distill", 2)):
            leading().run(StageOrder(stage, "worker", {}, processes), noted(here))
    assert end() is None
    assert here == [("estimate", 2, 2, 0), ("prune", 1, 1, 0), ("distill", 1, 2, 0)]
    assert there == [("estimate", 2, 2, 1), ("distill", 1, 2, 1)]
    assert leading() is None
    assert list(tmp_path.iterdir()) == []


def until_stopped(order, node, watch):
    stopped = threading.Event()
    watch(stopped.set)
    assert stopped.wait(60)
    return StageResult(1, cause="Error: the connection was closed")


@pytest.mark.parametrize(
    ("ending", "error", "words"),
    [
        (StageResult(2, refusal="node 1's corpus is too short"), InputError, "corpus is too short"),
        (StageResult(1, cause="ValueError: broken"), RuntimeError, "exit code 1"),
    ],
)
def test_a_failure_there_ends_the_stage_here(hosts, tmp_path, ending, error, words):
    """Without the alarm `until_stopped` waits for a minute and fails."""
    end = other(hosts[1], tmp_path / "run", lambda *_: ending)
    with pytest.raises(error, match=words), lead(hosts[0], "job", tmp_path / "run"):
        leading().run(StageOrder("distill", "worker", {}, 2), until_stopped)
    assert "node 0 ended" in str(end())


def test_processes_that_were_told_to_stop_say_so():
    """Not the last line of some library; but an error of a rank comes first."""
    with pytest.raises(
        RuntimeError, match=r"^distill was told to stop on node 1 \(SIGTERM\); run the same command again"
    ):
        StageResult(143, cause="a line of a library").check("distill", " on node 1")
    with pytest.raises(RuntimeError, match="exit code 143: rank 1: ValueError: broken"):
        StageResult(143, cause="rank 1: ValueError: broken").check("distill")


def test_a_training_that_diverged_is_told_from_other_failures():
    with pytest.raises(DivergedError, match="exit code 1: DivergedError: training stopped at step 3"):
        StageResult(1, cause="DivergedError: training stopped at step 3: the loss is NaN").check("distill")


def test_a_node_that_dies_ends_the_job(hosts, tmp_path):
    def dies(order, node, watch):
        raise KeyError("its process ends, and with it the connection")

    end = other(hosts[1], tmp_path / "run", dies)
    with pytest.raises(RuntimeError, match=r"node 1 .* is gone"), lead(hosts[0], "job", tmp_path / "run"):
        leading().run(StageOrder("distill", "worker", {}, 2), until_stopped)
    assert isinstance(end(), KeyError)


def test_a_leader_that_fails_ends_the_others(hosts, tmp_path):
    end = other(hosts[1], tmp_path / "run", until_stopped)
    with pytest.raises(RuntimeError, match="exit code 1"), lead(hosts[0], "job", tmp_path / "run"):
        leading().run(StageOrder("distill", "worker", {}, 2), lambda *_: StageResult(1, cause="ValueError: broken"))
    assert "node 0 ended: distill ended with exit code 1: ValueError: broken" in str(end())


def test_another_job_is_refused_on_both(hosts, tmp_path):
    end = other(hosts[1], tmp_path / "run", noted([]), identity="another job")
    with pytest.raises(InputError, match="another job"), lead(hosts[0], "job", tmp_path / "run"):
        pass
    assert "another job" in str(end())


def test_a_folder_that_is_not_shared_is_refused(hosts, tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "SILENCE", 1)
    end = other(hosts[1], tmp_path / "elsewhere" / "run", noted([]))
    with pytest.raises(InputError, match="node 1 does not see"), lead(hosts[0], "job", tmp_path / "run"):
        pass
    assert "node 1 does not see" in str(end())


def test_waiting_is_bounded(hosts, tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "MEETING", 1)
    with pytest.raises(RuntimeError, match="node 0 was not found"):
        follow_leader(hosts[1], "job", tmp_path / "run", noted([]))
    with pytest.raises(RuntimeError, match="node 1 did not come"), lead(hosts[0], "job", tmp_path / "run"):
        pass


# -- strangers -----------------------------------------------------------------------------------------
def stranger(host, *said, word=bytes(16)):
    """Connects as soon as node 0 listens, sends these bytes, and returns the open connection."""
    for _ in range(200):
        with contextlib.suppress(ConnectionRefusedError):
            connection = socket.create_connection((host.host, host.port), timeout=30)
            with contextlib.suppress(OSError):
                connection.sendall(word + b"".join(said))
            return connection
        time.sleep(0.05)
    raise AssertionError("node 0 does not listen")


HELLO = b'{"node": 1, "identity": "another job", "failed": true}\n'


@pytest.mark.parametrize(
    "said", [b"", HELLO, b"0" * 64 + b" " + HELLO, b"GET / HTTP/1.0\r\n\r\n", bytes(range(150, 249)), b"x" * (1 << 20)]
)
def test_a_stranger_ends_nothing(hosts, tmp_path, said):
    """A stranger sends nothing and stays, or sends what a node of another job would send."""
    here, there, open_ones = [], [], []
    visit = threading.Thread(target=lambda: open_ones.extend([stranger(hosts[0], said), stranger(hosts[0], said)]))
    visit.start()

    def late():
        visit.join()
        return follow_leader(hosts[1], "job", tmp_path / "run", noted(there))

    node = threading.Thread(target=late)
    node.start()
    with lead(hosts[0], "job", tmp_path / "run"):
        leading().run(StageOrder("distill", "worker", {}, 2), noted(here))
    node.join(60)
    assert (here, there) == ([("distill", 1, 2, 0)], [("distill", 1, 2, 1)])
    for connection in open_ones:
        connection.close()


def test_a_node_with_another_secret_is_not_heard(hosts, tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "MEETING", 5)
    end = other(dataclasses.replace(hosts[1], secret="a secret of another job"), tmp_path / "run", noted([]))
    with pytest.raises(RuntimeError, match="node 1 did not come"), lead(hosts[0], "job", tmp_path / "run"):
        pass
    assert "has another MINITRON_SECRET" in str(end())


@pytest.fixture
def ends():
    """The sockets at both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
    yield here, there
    here.close()
    there.close()


def relayed(ends, change):
    """What the second node receives if somebody between the two connections changes what node 0 sends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        own = socket.create_connection(server.getsockname())
        inner, _ = server.accept()
    made = {}
    leader = threading.Thread(target=lambda: made.update(leader=Connection(ends[0], WORD, leads=True)))
    node = threading.Thread(target=lambda: made.update(node=Connection(own, WORD, leads=False)))
    leader.start()
    node.start()
    inner.sendall(ends[1].recv(16))
    ends[1].sendall(inner.recv(16))
    leader.join()
    node.join()
    made["leader"].send(order=1)
    said = ends[1].makefile("rb").readline()
    with contextlib.suppress(OSError):
        inner.sendall(change(said))
        inner.close()
    heard = []
    with contextlib.suppress(ConnectionLost):
        while True:
            heard.append(made["node"].receive(30))
    return heard


@pytest.mark.parametrize(
    ("change", "heard"),
    [
        (lambda said: said, [{"order": 1}]),
        (lambda said: said + said, [{"order": 1}]),  # said again
        (lambda said: said.replace(b"1}", b"2}"), []),
        (lambda said: said[65:], []),
        (lambda said: said[:-1], []),
    ],
)
def test_what_another_changes_on_the_way_is_not_heard(ends, change, heard):
    assert relayed(ends, change) == heard


def test_what_a_node_said_cannot_be_said_back_to_it(ends):
    """Its own messages, with their HMACs, are sent to it in the other direction."""
    node = {}
    thread = threading.Thread(target=lambda: node.update(line=Connection(ends[0], WORD, leads=False)))
    thread.start()
    ends[1].sendall(ends[1].recv(16))
    thread.join()
    node["line"].send(failed=True)
    ends[1].sendall(ends[1].makefile("rb").readline())
    with pytest.raises(ConnectionLost):
        node["line"].receive(30)


def test_a_line_without_an_end_takes_no_memory(ends):
    node = {}
    thread = threading.Thread(target=lambda: node.update(line=Connection(ends[0], WORD, leads=False)))
    thread.start()
    ends[1].sendall(bytes(16))
    thread.join()
    with contextlib.suppress(OSError):
        for _ in range(3 * lines.FIRST >> 10):
            ends[1].sendall(b"x" * 1024)
    with pytest.raises(ConnectionLost):
        node["line"].receive(30)
