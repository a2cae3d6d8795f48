"""A disk that gets full: no command hangs, path and cause are named, and it goes on once there is space."""

import os
import subprocess
import time

import pytest
from command_line import start

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.files import write_json
from nemo_minitron.families import from_hf
from nemo_minitron.hosts.nemo.saved import damage
from nemo_minitron.pruning import prune
from nemo_minitron.search import random_plan

STEPS = 160


@pytest.fixture
def disk(tmp_path, request):
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(place)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place):
    """All of it, to the last byte."""
    with open(place / "filler", "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


@pytest.mark.parametrize("disk", ["256k"], indirect=True)
def test_files_that_find_no_space_are_named_and_leave_nothing(disk):
    """In Python and in a library written in Rust."""
    plan = disk / "plan.json"
    write_json(plan, 1)
    fill(disk)
    for file, write in ((plan, lambda: write_json(plan, [1] * 100_000)), (disk / "x.safetensors", lambda: saved(disk))):
        with pytest.raises(OSError, match="No space left on device") as caught:
            write()
        assert caught.value.filename == str(file)
    assert plan.read_text() == "1\n"
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "plan.json"]


def saved(disk):
    import numpy as np

    from nemo_minitron.artifacts import Compensation

    Compensation("digest", {"w": np.zeros(100_000, np.float32)}).save(disk / "x.safetensors")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("disk", ["64m"], indirect=True)
def test_a_training_on_a_full_disk_ends_and_goes_on_afterwards(world, disk):
    """It gets full after the first checkpoint: log, losses and the next checkpoint have no place."""
    prune(world / "teacher", random_plan(from_hf(world / "teacher"), keep={"ffn": 64}), disk / "pruned")
    command = ["distill", disk / "pruned", "--teacher", "teacher", "--data", "corpus.jsonl", "--precision", "fp32"]
    command += ["--tokens", 32 * STEPS, "--sequence-length", 32, "--save-every", 20, "--out", disk / "student"]
    process = start(world, *command)
    training = disk / ".student.work" / "training"
    checkpoints, deadline = training / "nemo" / "checkpoints", time.monotonic() + 300
    while not any(checkpoints.glob("*-last")) or any(checkpoints.glob("*-unfinished")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout.read()[-4000:]
        time.sleep(0.02)
    fill(disk)
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 1, output
    (sentence,) = [line for line in output.splitlines() if line.startswith("minitron: ")]
    assert "No space left on device" in sentence
    assert str(disk) in sentence
    assert not any(checkpoints.glob("*-unfinished"))
    assert [damage(path) for path in checkpoints.glob("*-last")] == [""]
    assert [path.name for path in disk.rglob("*minitron-*")] == []
    rows = (training / "loss.csv").read_text().splitlines()
    assert len(rows) > 20
    (disk / "filler").unlink()
    process = start(world, *command)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    after = (disk / "student" / "loss.csv").read_text().splitlines()
    assert after[:21] == rows[:21]
    assert len(after) == STEPS + 1
    assert PrunePlan.load(disk / "pruned" / "minitron_plan.json").target == from_hf(disk / "student")
