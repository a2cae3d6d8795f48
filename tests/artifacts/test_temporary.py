"""What a killed process leaves is removed by the next; what a living one holds is not."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from nemo_minitron.artifacts import temporary
from nemo_minitron.artifacts.files import atomic_file, atomic_folder
from nemo_minitron.artifacts.temporary import apart, sweep
from nemo_minitron.launch.lock import locked

HOLD = """
import os, sys, time
from pathlib import Path
from nemo_minitron.artifacts.files import atomic_file, atomic_folder
from nemo_minitron.artifacts.temporary import apart
kind, place = sys.argv[1:]
block = {"file": lambda: atomic_file(Path(place, "a.json")), "folder": lambda: atomic_folder(Path(place, "stu")),
         "apart": apart}[kind]()
with block as temporary:
    (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold(tmp_path, monkeypatch):
    """Starts a process that is in the midst of a write."""
    monkeypatch.setattr(temporary, "_swept", set())
    monkeypatch.setattr(temporary.tempfile, "tempdir", str(tmp_path))
    holders = []

    def start(kind):
        command = [sys.executable, "-c", HOLD, kind, str(tmp_path)]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert holder.stdout.readline() == "held\n"
        holders.append(holder)
        return holder

    yield start
    for holder in holders:
        holder.kill()
        holder.wait()


WAYS = {
    "file": lambda place: write(atomic_file(place / "other.json")),
    "folder": lambda place: write(atomic_folder(place / "other")),
    "apart": lambda place: write(apart()),
}


def write(block):
    with block as made:
        (made / "file" if made.is_dir() else made).write_text("whole")


@pytest.mark.parametrize("kind", WAYS)
def test_a_killed_ones_goes_and_a_living_ones_stays(tmp_path, hold, monkeypatch, kind):
    """Another name is written in the same place. Mutation: without the lock the living one's goes too."""
    dead, living = hold(kind), hold(kind)
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert len(litter(tmp_path)) == 2
    WAYS[kind](tmp_path)
    assert len(litter(tmp_path)) == 1
    living.send_signal(signal.SIGKILL)
    living.wait()
    monkeypatch.setattr(temporary, "_swept", set())  # as in the next process
    WAYS[kind](tmp_path)
    assert litter(tmp_path) == []


def litter(place):
    return [path for path in place.iterdir() if "minitron-" in path.name]


def test_a_command_on_a_folder_removes_what_lies_deep_in_it(tmp_path, hold):
    (tmp_path / "checkpoints").mkdir()
    left = hold("folder")
    left.kill()
    left.wait()
    (found,) = litter(tmp_path)
    found.rename(tmp_path / "checkpoints" / found.name)
    (tmp_path / ".student.work").mkdir()  # a command's own folder
    (tmp_path / ".env").write_text("mine")
    with locked(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".env", ".lock", ".student.work", "checkpoints"]
        assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_thread_that_sweeps_beside_one_that_writes_takes_nothing(tmp_path):
    """Between a folder's making and its lock it looks like litter: then it is made again."""
    stop = threading.Event()

    def sweeping():
        while not stop.is_set():
            sweep(tmp_path)

    thread = threading.Thread(target=sweeping)
    thread.start()
    try:
        for number in range(200):
            with atomic_folder(tmp_path / "f") as folder:
                (folder / "number").write_text(str(number))
            assert (tmp_path / "f" / "number").read_text() == str(number)
    finally:
        stop.set()
        thread.join()
    assert litter(tmp_path) == []
