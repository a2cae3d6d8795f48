"""Node 0 and another over a real connection; what a stage does there is a function of this test."""

import socket
import threading

import pytest

from nemo_minitron.errors import DivergedError, InputError
from nemo_minitron.job.processes import together
from nemo_minitron.job.processes.nodes import Nodes
from nemo_minitron.job.processes.together import Ending, Order, follow, lead, leading


@pytest.fixture
def hosts():
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return Nodes(2, 0, "127.0.0.1", port), Nodes(2, 1, "127.0.0.1", port)


def other(host, folder, work, identity="job"):
    """The second node, in a thread -> its error, once it has ended."""
    errors = []

    def run():
        try:
            follow(host, identity, folder, work)
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
    return lambda order, node, watch: done.append((order.stage, order.each, order.nodes, node)) or Ending(0)


def test_each_node_does_its_part(hosts, tmp_path):
    here, there = [], []
    end = other(hosts[1], tmp_path / "run", noted(there))
    with lead(hosts[0], "job", tmp_path / "run"):
        for stage, processes in (("estimate", 4), ("prune", 1), ("distill", 2)):
            leading().run(Order(stage, {}, processes), noted(here))
    assert end() is None
    assert here == [("estimate", 2, 2, 0), ("prune", 1, 1, 0), ("distill", 1, 2, 0)]
    assert there == [("estimate", 2, 2, 1), ("distill", 1, 2, 1)]
    assert leading() is None
    assert list(tmp_path.iterdir()) == []


def until_stopped(order, node, watch):
    stopped = threading.Event()
    watch(stopped.set)
    assert stopped.wait(60)
    return Ending(1, cause="Error: the connection was closed")


@pytest.mark.parametrize(
    ("ending", "error", "words"),
    [
        (Ending(2, refusal="node 1's corpus is too short"), InputError, "corpus is too short"),
        (Ending(1, cause="ValueError: broken"), RuntimeError, "exit code 1"),
    ],
)
def test_a_failure_there_ends_the_stage_here(hosts, tmp_path, ending, error, words):
    """Without the alarm `until_stopped` waits for a minute and fails."""
    end = other(hosts[1], tmp_path / "run", lambda *_: ending)
    with pytest.raises(error, match=words), lead(hosts[0], "job", tmp_path / "run"):
        leading().run(Order("distill", {}, 2), until_stopped)
    assert "node 0 ended" in str(end())


def test_a_training_that_diverged_is_told_from_other_failures():
    with pytest.raises(DivergedError, match="exit code 1: DivergedError: training stopped at step 3"):
        Ending(1, cause="DivergedError: training stopped at step 3: the loss is NaN").check("distill")


def test_a_node_that_dies_ends_the_job(hosts, tmp_path):
    def dies(order, node, watch):
        raise KeyError("its process ends, and with it the connection")

    end = other(hosts[1], tmp_path / "run", dies)
    with pytest.raises(RuntimeError, match=r"node 1 .* is gone"), lead(hosts[0], "job", tmp_path / "run"):
        leading().run(Order("distill", {}, 2), until_stopped)
    assert isinstance(end(), KeyError)


def test_a_leader_that_fails_ends_the_others(hosts, tmp_path):
    end = other(hosts[1], tmp_path / "run", until_stopped)
    with pytest.raises(RuntimeError, match="exit code 1"), lead(hosts[0], "job", tmp_path / "run"):
        leading().run(Order("distill", {}, 2), lambda *_: Ending(1, cause="ValueError: broken"))
    assert "node 0 ended: distill ended with exit code 1: ValueError: broken" in str(end())


def test_another_job_is_refused_on_both(hosts, tmp_path):
    end = other(hosts[1], tmp_path / "run", noted([]), identity="another job")
    with pytest.raises(InputError, match="another job"), lead(hosts[0], "job", tmp_path / "run"):
        pass
    assert "another job" in str(end())


def test_a_folder_that_is_not_shared_is_refused(hosts, tmp_path, monkeypatch):
    monkeypatch.setattr(together, "SILENCE", 1)
    end = other(hosts[1], tmp_path / "elsewhere" / "run", noted([]))
    with pytest.raises(InputError, match="node 1 does not see"), lead(hosts[0], "job", tmp_path / "run"):
        pass
    assert "node 1 does not see" in str(end())


def test_waiting_is_bounded(hosts, tmp_path, monkeypatch):
    monkeypatch.setattr(together, "MEETING", 1)
    with pytest.raises(RuntimeError, match="node 0 is not to be found"):
        follow(hosts[1], "job", tmp_path / "run", noted([]))
    with pytest.raises(RuntimeError, match="node 1 did not come"), lead(hosts[0], "job", tmp_path / "run"):
        pass
