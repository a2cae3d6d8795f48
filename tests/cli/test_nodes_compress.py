"""`minitron compress` on two hosts, each with a network of its own: the single process's result, and a host that dies.

Two network namespaces with a cable between them where this machine lets a test make them, else two loopback
addresses. Both hosts see one folder, as a cluster's nodes do. TP=2 is inside a host; PP=2 across them, from the
calibration on, until one dies, then DP=2, which goes on from the other layout's checkpoint.

This is how it failed while it was written: the first host waited for the end of its ranks' output, which the helper
of a saved checkpoint held open after they had left.
"""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from command_line import TEXTS, minitron
from forked import Forked
from pico import pico_llama
from tolerances import LOSS_LAYOUT_FP32, LOSS_PRINTED, SCORES_FP32
from words import save_tokenizer

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.launch.connection import SECRET

pytestmark = pytest.mark.slow
STEPS, SAVED = 24, 6
RECIPE = f"""
from nemo_minitron.job import *
def recipe():
    return Job(
        name="pico", teacher="teacher", data=Data("corpus.jsonl", "corpus.jsonl"), keep={{"ffn": 66, "hidden": 40}},
        calibration=Calibration(samples=8, sequence_length=36, batch_size=2), cutting=Cutting(compensate=False),
        distillation=Distillation(
            tokens=36 * 4 * {STEPS}, sequence_length=36, global_batch_size=4, micro_batch_size=1, learning_rate=1e-3,
            warmup_steps=1, precision="fp32", save_every={SAVED},
        ),
        evaluation=Evaluation(tokens=64, sequence_length=32, precision="fp32", random_baseline=False),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("nodes")
    pico_llama(made / "teacher", vocab_size=509, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
    save_tokenizer(made / "teacher", TEXTS, 509)
    (made / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (made / "recipe.py").write_text(RECIPE)
    return made


def ip(*words):
    return subprocess.run(["ip", *map(str, words)], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def hosts():
    """For each host: what a command there starts with, and its environment; and the first one's address."""
    names = [f"mt{os.getpid()}{side}" for side in "ab"]
    try:
        if shutil.which("ip") and all(ip("netns", "add", name) for name in names) and _cable(names):
            interface = {"GLOO_SOCKET_IFNAME": "eth0"}
            yield [(["ip", "netns", "exec", name], interface) for name in names], "10.77.0.1"
        else:
            yield [([], {})] * 2, "127.0.0.2"
    finally:
        for name in names:
            ip("netns", "del", name)


def _cable(names):
    first, second = (["-n", name] for name in names)
    return (
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        and all(ip(*side, "link", "set", device, "up") for side in (first, second) for device in ("lo", "eth0"))
        and ip(*first, "addr", "add", "10.77.0.1/24", "dev", "eth0")
        and ip(*second, "addr", "add", "10.77.0.2/24", "dev", "eth0")
    )


def start(folder, hosts, across):
    """The same command on both hosts, spread over them by --dp or --pp -> their processes."""
    places, address = hosts
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "nemo_minitron.cli", "compress", "recipe.py", "--out", "two", "--tp", 2, across, 2]
    command += ["--nodes", 2, "--rendezvous", f"{address}:{port}", "--node-rank"]
    return [
        Forked(
            [*prefix, *map(str, command), str(rank)], cwd=folder, env=os.environ | extra | {SECRET: "s" * 16},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank, (prefix, extra) in enumerate(places)
    ]  # fmt: skip


def rows(file):
    return list(csv.DictReader(file.open())) if file.exists() else []


def test_two_hosts_give_one_process_result_though_one_dies(folder, hosts):
    """Both hosts end within a minute of the second one's death."""
    losses = folder / "two" / "checkpoints" / "distilled" / "loss.csv"
    first, second = start(folder, hosts, "--pp")
    deadline = time.monotonic() + 300
    while len(rows(losses)) < SAVED + 2 and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert first.poll() is None, first.communicate()[0]
    second.send_signal(signal.SIGKILL)  # with it goes the pipe that its workers hang on
    output = first.communicate(timeout=60)[0]
    second.communicate(timeout=60)
    assert first.returncode == 1
    assert "node 1 (" in output
    assert "is gone" in output
    done = len(rows(losses))
    assert SAVED < done < STEPS

    pair = start(folder, hosts, "--dp")
    again = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], again
    assert again[0].count("done before, skipped") == 6
    minitron(folder, "compress", "recipe.py", "--out", "one")
    _same_scores(folder)
    two, one = rows(losses), rows(folder / "one" / "checkpoints" / "distilled" / "loss.csv")
    assert [row["step"] for row in two] == [row["step"] for row in one] == [str(n + 1) for n in range(STEPS)]
    a, b = ([float(row["loss"]) for row in table] for table in (two, one))
    np.testing.assert_allclose(a, b, rtol=LOSS_LAYOUT_FP32, atol=LOSS_PRINTED)
    for run in ("one", "two"):  # a job folds the norms of a cut of hidden channels
        pruned = json.loads((folder / run / "checkpoints" / "pruned" / "minitron_compensation.json").read_text())
        assert pruned["folded norms"] is True


def _same_scores(folder):
    one, two = (Scores.load(folder / run / "scores.safetensors") for run in ("one", "two"))
    for axis in ("ffn", "heads", "norms", "layers"):
        a, b = np.asarray(one[axis]), np.asarray(two[axis])
        assert np.abs(a - b).max() <= SCORES_FP32 * np.abs(a).max(), axis
    plans = [PrunePlan.load(folder / run / "plan.json").keep for run in ("one", "two")]
    assert plans[0] == plans[1]
