"""`minitron rotate`, and a job that rotates before it cuts hidden channels."""

import json
import sys

import numpy as np
import pytest
from command_line import TEXTS, minitron
from forked import Forked
from pico import pico_llama, pico_nemotron, raw_tensors
from words import save_tokenizer

from nemo_minitron.artifacts import Scores
from nemo_minitron.families import from_hf, read_config

pytestmark = pytest.mark.slow
ROWS = ["--data", "corpus.jsonl", "--samples", 4, "--sequence-length", 36]
RECIPE = {
    "name": "pico",
    "teacher": "teacher",
    "data": {"train": "corpus.jsonl", "test": "corpus.jsonl"},
    "keep": {"hidden": 40, "ffn": 64},
    "cutting": {"rotate": True},
    "calibration": {"samples": 4, "sequence_length": 36, "batch_size": 2, "precision": "fp32"},
    "distillation": {
        "tokens": 216, "sequence_length": 36, "global_batch_size": 2, "micro_batch_size": 1, "learning_rate": 0.001,
        "warmup_steps": 1, "precision": "fp32",
    },
    "evaluation": {"tokens": 256, "sequence_length": 32, "precision": "fp32"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("rotate")
    save_tokenizer(pico_llama(place / "teacher"), TEXTS, 509)
    save_tokenizer(pico_nemotron(place / "layernorm"), TEXTS, 509)
    (place / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:120]))
    (place / "recipe.json").write_text(json.dumps(RECIPE))
    return place


def refused(folder, *arguments):
    command = [sys.executable, "-m", "nemo_minitron.cli", *map(str, arguments)]
    process = Forked(command, cwd=folder, stdout=-1, stderr=-2, text=True)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2, output
    return output.splitlines()[-1]


def test_the_command(folder):
    output = minitron(folder, "rotate", "teacher", *ROWS, "--out", "rotated")
    assert "rotated: the stream's energy: " in output
    assert output.splitlines()[-1] == "next: minitron estimate rotated --data corpus.jsonl"
    record = json.loads((folder / "rotated" / "minitron_rotation.json").read_text())
    assert (record["samples"], record["sequence_length"], record["mixed_channels"]) == (4, 36, 48)
    assert sum(record["energy"]) == pytest.approx(1, abs=1e-6)
    assert read_config(folder / "rotated") == read_config(folder / "teacher")
    assert (folder / "rotated" / "tokenizer.json").read_bytes() == (folder / "teacher" / "tokenizer.json").read_bytes()
    assert not list(folder.glob(".rotated*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("layernorm", *ROWS, "--out", "new"), "this model has LayerNorm"),
        (("teacher", *ROWS, "--out", "teacher"), "'teacher' already exists; give a new folder with --out"),
        (("nowhere", *ROWS, "--out", "new"), "'nowhere'"),
        (("teacher", "--data", "nothing.txt", "--out", "new"), "'nothing.txt'"),
    ],
)
def test_what_is_refused_leaves_nothing(folder, arguments, words):
    before = sorted(path.name for path in folder.iterdir())
    assert words in refused(folder, "rotate", *arguments)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.fixture(scope="module")
def run(folder):
    minitron(folder, "compress", "recipe.json", "--out", "run")
    return folder / "run"


def test_a_job_scores_and_cuts_the_rotated_teacher(run):
    """The gates are open, and the student that learned from the teacher as it is has every tensor moved."""
    rotated = run / "checkpoints" / "rotated"
    assert from_hf(rotated) == from_hf(run.parent / "teacher")
    norm = raw_tensors(rotated)["model.layers.0.input_layernorm.weight"].view(np.float32)
    assert (norm == norm[0]).all()
    hidden = Scores.load(run / "scores.safetensors")["hidden"]
    assert hidden[:8].min() > hidden[-8:].max()  # the first axes carry most
    gates = json.loads((run / "gates.json").read_text())["gates"]
    assert len(gates) == 5
    assert {gate["state"] for gate in gates} == {"passed", "not checked"}
    start, end = (raw_tensors(run / name) for name in ("checkpoints/pruned", "student"))
    assert not [name for name in end if np.array_equal(start[name], end[name])]
    assert not (run / "checkpoints" / "covariance.npy").exists()


def test_a_second_call_does_nothing(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("model*.safetensors")}
    assert "rotate" in minitron(run.parent, "compress", "recipe.json", "--out", "run")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("model*.safetensors")} == before


def test_the_dry_run_counts_the_rotation(folder):
    output = minitron(folder, "compress", "recipe.json", "--dry-run")
    assert "stages: data, rotate, estimate, plan" in output
    assert "rotation " in output
    plain = minitron(folder, "compress", "recipe.json", "--dry-run", "cutting.rotate=false")
    assert "rotat" not in plain


def test_a_job_that_cannot_rotate(folder):
    assert "this model has LayerNorm" in refused(folder, "compress", "recipe.json", "--dry-run", "teacher=layernorm")
