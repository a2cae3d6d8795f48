"""A rank that a signal ends, or that makes no progress, is named: real processes, torchrun among them."""

import os
import time

import pytest
from pico_order import pico_order

from nemo_minitron.launch import death
from nemo_minitron.launch import torchrun as launching
from nemo_minitron.launch.death import killed
from nemo_minitron.launch.output import Rank
from nemo_minitron.launch.stall import stalled, words_of
from nemo_minitron.launch.torchrun import launch

OUT_OF_MEMORY = "was killed by SIGKILL, as the system does when memory runs out"
ENTRY = """
[0]:
  time      : 2026-11-28_10:00:00
  host      : here
  rank      : {0} (local_rank: {0})
  exitcode  : {1} (pid: 12)
  error_file: <N/A>
"""
ROOT = f"Root Cause (first observed failure):{ENTRY}"
WORKER = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_DFL)
from nemo_minitron.hosts import beat
rank = int(os.environ["RANK"])
if sys.argv[1] == f"unheard {rank}":
    os.kill(os.getpid(), signal.SIGSTOP)
beat.begin()
if rank == int(sys.argv[1][-1]):
    if sys.argv[1].startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1].startswith("stopped"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if sys.argv[1].startswith("crashed"):
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(600)
beat._layers[0] += 5
time.sleep(600)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / "pico_worker.py").write_text(WORKER)
    monkeypatch.setenv(
        "PYTHONPATH", f"{tmp_path}{os.pathsep}{os.path.dirname(os.path.dirname(launching.__file__))}/../.."
    )


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("killed 1", "killed 1 ended with exit code 1: rank 1 was killed by SIGKILL.*memory"),
        ("crashed 0", "crashed 0 ended with exit code 1: rank 0 was killed by SIGSEGV; "),
        ("stopped 0", r"rank 0 has made no progress for \d+ s \(process \d+, a signal has stopped it\)"),
        ("unheard 1", r"rank 1 has made no progress for \d+ s \(process \d+, a signal has stopped it\)"),
        ("waiting 1", r"rank 1 has made no progress for \d+ s \(process \d+\); --stall-timeout"),
    ],
)
@pytest.mark.slow
def test_the_rank_is_named_soon(stage, words, worker, tmp_path, monkeypatch):
    """The other rank sleeps for ten minutes, and the test must not take so long."""
    start = time.monotonic()
    if stage.startswith(("stopped", "waiting", "unheard")):
        monkeypatch.setenv("MINITRON_STALL_TIMEOUT", "3")
    with pytest.raises(RuntimeError, match=words):
        launch(pico_order(stage, 2), "pico_worker", tmp_path / "log.txt")
    assert time.monotonic() - start < 120
    assert not processes(str(tmp_path))


def test_one_process_that_stalls_is_named_and_gone(worker, tmp_path, monkeypatch):
    monkeypatch.setenv("MINITRON_STALL_TIMEOUT", "3")
    with pytest.raises(RuntimeError, match=r"stopped 0 ended with exit code 1: rank 0 .* a signal has stopped it"):
        launch(pico_order("stopped 0", 1), "pico_worker", tmp_path / "log.txt")
    assert not processes(str(tmp_path))


def processes(place):
    """The processes whose environment names a folder."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if f"PYTHONPATH={place}".encode() in file.read() and int(pid) != os.getpid():
                    found.append(int(pid))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("code", "lines", "words"),
    [
        (1, ROOT.format(1, -9), f"rank 1 {OUT_OF_MEMORY}"),
        (1, ENTRY.format(0, -9) + ROOT.format(5, -11), "rank 5 was killed by SIGSEGV"),  # torchrun has killed rank 0
        (1, ENTRY.format(0, -6) + ROOT.format(5, 1), ""),  # it has lost rank 5, whose error is told
        (1, ROOT.format(0, 1), ""),
        (-9, "", f"rank 0 {OUT_OF_MEMORY}"),
        (-6, "", "rank 0 was killed by SIGABRT"),
        (2, "ValueError: it\n", ""),
    ],
)
def test_signals_in_words(code, lines, words, monkeypatch):
    monkeypatch.setattr(death, "oom_kills", lambda: 3)
    assert killed(code, lines.splitlines(keepends=True), 3) == words


def test_a_kill_for_lack_of_memory_is_said(monkeypatch):
    monkeypatch.setattr(death, "oom_kills", lambda: 4)
    assert killed(-9, [], 3).endswith("SIGKILL: it ran out of memory, and the system's out-of-memory killer ended it")
    assert killed(-11, [], 3) == "rank 0 was killed by SIGSEGV"
    assert killed(-11, [], 3, alone=False) == "torchrun was killed by SIGSEGV"


def test_any_ranks_progress_counts_and_the_one_behind_is_named():
    now = time.monotonic()
    ranks = {0: Rank(1, [1], layers=9, since=now - 50), 1: Rank(1, [1], layers=7, since=now - 20)}
    assert not stalled(ranks, now - 99, 30)
    assert not stalled(ranks, now - 99, 0)
    assert stalled(ranks, now - 99, 10)
    assert words_of(ranks, now - 99) == "rank 1 has made no progress for 20 s (process 1)"
    ranks[1].layers = 9
    assert words_of(ranks, now - 99) == "rank 0 has made no progress for 20 s (process 1), nor has any other rank"
    assert not stalled({}, now - 99, 100)
    assert stalled({}, now - 99, 90)
    assert words_of({}, now - 99) == "no rank has reported its progress for 99 s"
