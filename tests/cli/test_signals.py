"""Ctrl-C, SIGTERM and SIGKILL to `minitron`: its exit code, and no process of it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import TEXTS
from pico import pico_llama
from words import save_tokenizer

pytestmark = pytest.mark.slow
RANKS = 2


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    pico_llama(folder / "teacher", num_attention_heads=4, num_key_value_heads=2)
    save_tokenizer(folder / "teacher", TEXTS, 509)
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return folder


def workers(scratch):
    """Processes whose command line names the scratch folder: each rank's settings lie in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(scratch) in line and "nemo_minitron.nemo.worker" in line:
            found.append(int(path.parent.name))
    return found


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_worker_outlives_the_command(teacher, tmp_path, number, code):
    """The signal goes to `minitron` alone. Without the lifeline in worker.py SIGKILL leaves torchrun and both
    ranks at work, and the wait for them runs out."""
    command = [
        sys.executable,
        "-m",
        "nemo_minitron.cli",
        "estimate",
        "teacher",
        "--data",
        "corpus.jsonl",
        "--tp",
        RANKS,
    ]
    command += ["--samples", 64, "--sequence-length", 32, "--out", tmp_path / "scores.safetensors"]
    process = subprocess.Popen(
        [str(word) for word in command], cwd=teacher, env=os.environ | {"TMPDIR": str(tmp_path)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    until(lambda: len(workers(tmp_path)) > RANKS or process.poll() is not None, 300)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == code, error
    assert "Traceback" not in error
    assert ("interrupted" in error) == (number != signal.SIGKILL)
    until(lambda: not workers(tmp_path), 120)
    assert not (tmp_path / "scores.safetensors").exists()
