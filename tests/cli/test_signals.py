"""Ctrl-C, SIGTERM and SIGKILL to `minitron`: its exit code, and no process of it goes on; preempted, it saves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import TEXTS, minitron
from pico import pico_llama
from words import save_tokenizer

from nemo_minitron.families import from_hf
from nemo_minitron.pruning import prune
from nemo_minitron.search import random_plan

pytestmark = pytest.mark.slow
RANKS, STEPS = 2, 150
long = pytest.mark.long


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    pico_llama(folder / "teacher", num_attention_heads=4, num_key_value_heads=2)
    save_tokenizer(folder / "teacher", TEXTS, 509)
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return folder


def started(folder, scratch, command):
    """`minitron`, whose workers' settings lie in the scratch folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "nemo_minitron.cli", *map(str, command)], cwd=folder, text=True,
        env=os.environ | {"TMPDIR": str(scratch)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), start_new_session=True,
    )  # fmt: skip


def workers(scratch):
    """Processes whose command line names the scratch folder: each rank's settings lie in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(scratch) in line and "nemo_minitron.hosts.nemo.worker" in line:
            found.append(int(path.parent.name))
    return found


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=long), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_no_worker_outlives_the_command(teacher, tmp_path, number, code):
    """The signal goes to `minitron` alone. Without the lifeline in worker.py SIGKILL leaves torchrun and both
    ranks at work, and the wait for them runs out."""
    command = ["estimate", "teacher", "--data", "corpus.jsonl", "--tp", RANKS, "--samples", 64]
    command += ["--sequence-length", 32, "--out", tmp_path / "scores.safetensors"]
    process = started(teacher, tmp_path, command)
    until(lambda: len(workers(tmp_path)) > RANKS or process.poll() is not None, 300)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == code, error
    assert "Traceback" not in error
    assert ("interrupted" in error) == (number != signal.SIGKILL)
    until(lambda: not workers(tmp_path), 120)
    assert not (tmp_path / "scores.safetensors").exists()


def rank_of(pid):
    """What torchrun has told a worker; None of its own process, and of one that is gone."""
    try:
        items = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return None
    return dict(item.split("=", 1) for item in items if "=" in item).get("RANK")


@pytest.mark.parametrize(
    ("number", "words", "patience"),
    [
        (signal.SIGKILL, "estimate ended with exit code 1: rank 1 was killed by SIGKILL", 600),
        pytest.param(
            signal.SIGSTOP, "estimate ended with exit code 1: rank 1 has made no progress for 1", 15, marks=long
        ),
    ],
)
def test_a_rank_that_dies_or_stalls_is_named(teacher, tmp_path, number, words, patience):
    """The other rank waits for it in a collective, for half an hour if nobody ends it."""
    command = ["estimate", "teacher", "--data", "corpus.jsonl", "--tp", RANKS, "--samples", 64]
    command += ["--sequence-length", 32, "--stall-timeout", patience, "--out", tmp_path / "scores.safetensors"]
    process = started(teacher, tmp_path, command)
    until(lambda: "1" in map(rank_of, workers(tmp_path)) or process.poll() is not None, 300)
    assert process.poll() is None, process.communicate()
    os.kill(next(pid for pid in workers(tmp_path) if rank_of(pid) == "1"), number)
    error = process.communicate(timeout=240)[1]
    assert process.returncode == 1, error
    assert words in error
    assert "Traceback" not in error
    assert workers(tmp_path) == []


def rows(file):
    return file.read_text().splitlines()[1:] if file.exists() else []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=long)])
def test_a_preempted_training_saves_and_goes_on(teacher, tmp_path, number, code):
    """SIGTERM reaches `minitron` and its worker, as Slurm sends it; Ctrl-C reaches the command's process group.
    No step but the last would be saved without it:
    then the second run would begin at step 1 and write all rows anew."""
    prune(teacher / "teacher", random_plan(from_hf(teacher / "teacher"), keep={"ffn": 64}), tmp_path / "pruned")
    command = ["distill", tmp_path / "pruned", "--teacher", "teacher", "--data", "corpus.jsonl", "--precision", "fp32"]
    command += ["--tokens", 32 * STEPS, "--sequence-length", 32, "--save-every", STEPS, "--out", tmp_path / "student"]
    process = started(teacher, tmp_path, command)
    losses = tmp_path / ".student.work" / "training" / "loss.csv"
    until(lambda: len(rows(losses)) > 4 or process.poll() is not None, 300)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        for victim in (process.pid, *workers(tmp_path)):
            os.kill(victim, number)
    output = "".join(process.communicate(timeout=120))
    assert process.returncode == code, output
    assert "told to stop, saved" in output
    first = rows(losses)
    assert 4 < len(first) < STEPS
    minitron(teacher, *command)
    after = rows(tmp_path / "student" / "loss.csv")
    assert after[: len(first)] == first
    assert [int(row.split(",")[0]) for row in after] == list(range(1, STEPS + 1))
