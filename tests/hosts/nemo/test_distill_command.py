"""`minitron distill` with most of its settings, over two pipeline stages that divide the layers unevenly."""

import csv
import json
import sys

import forked
import numpy as np
import pytest
from pico import pico_llama, raw_tensors, wider
from tolerances import LOSS_LAYOUT_FP32
from words import save_tokenizer

from nemo_minitron.families import from_hf
from nemo_minitron.pruning import prune
from nemo_minitron.search import random_plan

pytestmark = pytest.mark.slow
TEXTS = [f"the model number {i} reads {i * 7} words and the next {'word ' * (i % 9)}ends." for i in range(300)]
BASE = {"tokens": 384, "sequence-length": 24, "global-batch-size": 4, "precision": "fp32", "data": "corpus.jsonl"}
MORE = {
    "pp": 2, "loss": "reverse_kl", "lm-weight": 0.5, "intermediate": "auto", "plan": "plan.json",
    "correction-tokens": 192, "validation": "corpus.jsonl", "validate-every": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    pico_llama(folder / "teacher", num_hidden_layers=7)
    save_tokenizer(folder / "teacher", TEXTS, 509)
    plan = random_plan(from_hf(folder / "teacher"), keep={"ffn": 64, "layers": 5})
    plan.save(folder / "plan.json")
    prune(folder / "teacher", plan, folder / "student")
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return folder, plan


def distill(folder, out, options, teacher="teacher"):
    command = [sys.executable, "-m", "nemo_minitron.cli", "distill", "student", "--teacher", teacher, "--out", out]
    command += [str(word) for name, value in (BASE | options).items() for word in (f"--{name}", value)]
    return forked.run(command, cwd=folder)


def test_a_student_of_uneven_stages_with_all_losses_and_a_corrected_teacher(world):
    folder, plan = world
    done = distill(folder, "out", MORE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = list(csv.DictReader((folder / "out" / "loss.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    gaps = [name for name in rows[0] if name.startswith("block:")]
    assert list(rows[0]) == ["step", "tokens", "loss", "seconds", "logits", "lm", "embedding", *gaps, "alpha"]
    assert gaps  # in front of what the plan dropped
    assert from_hf(folder / "out") == plan.target
    before, after = raw_tensors(folder / "student"), raw_tensors(folder / "out")
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    assert [row["step"] for row in csv.DictReader((folder / "out" / "validation.csv").open())] == ["2", "4"]
    assert "next: minitron chat out --beside teacher" in done.stdout
    assert not (folder / ".out.work").exists()
    card = (folder / "out" / "README.md").read_text()
    assert "forward_kl" not in card
    assert f"reverse_kl, {BASE['tokens']:,} tokens" in card.replace("\\_", "_")
    assert f"| {plan.source.num_layers} | {plan.target.num_layers} |" in card
    assert "![Distillation](figures/distillation.png)" in card
    assert (folder / "out" / "figures" / "distillation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pp": 2, "vp": 2}, "nearest legal"),  # 5 layers
        ({"dp": 2, "global-batch-size": 3}, "the nearest legal size is 4"),
        ({"intermediate": "auto"}, "no plan says which"),
        ({"intermediate": "block:9:9"}, "layer 9 of the student, whose last is 4"),
        ({"validate-every": 2}, "--validation"),
    ],
)
def test_refusals(world, options, said):
    done = distill(world[0], "no", options)
    assert done.returncode == 2, done.stderr[-3000:]
    assert said in " ".join((done.stdout + done.stderr).split())


LEFT_OUT = ("correction-tokens", "validation", "validate-every")
ONE_STEP = {name: MORE[name] for name in MORE if name not in LEFT_OUT} | {"tokens": 96}


def test_a_training_of_one_step_is_saved(world):
    """Without the correction; its first losses are those of another teacher than the corrected one."""
    folder, plan = world
    done = distill(folder, "one", ONE_STEP)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = csv.DictReader((folder / "one" / "loss.csv").open())
    corrected = next(csv.DictReader((folder / "out" / "loss.csv").open()))
    assert float(row["lm"]) == pytest.approx(float(corrected["lm"]), rel=LOSS_LAYOUT_FP32)
    assert abs(float(row["logits"]) / float(corrected["logits"]) - 1) > 5 * LOSS_LAYOUT_FP32
    assert from_hf(folder / "one") == plan.target


def test_a_teacher_with_more_rows_teaches_the_tokens_that_both_have(world):
    """The same losses as of the teacher without them, and the command says so."""
    folder, plan = world
    wider(folder / "teacher", folder / "wider", 512)
    done = distill(folder, "by-wider", ONE_STEP, teacher="wider")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "it learns the 509 that both begin with, and the others are masked" in done.stderr
    found, expected = (next(csv.DictReader((folder / out / "loss.csv").open())) for out in ("by-wider", "one"))
    assert {name: found[name] for name in found if name != "seconds"} == {
        name: expected[name] for name in expected if name != "seconds"
    }
    assert from_hf(folder / "by-wider") == plan.target
    assert "It learned the 509 tokens that its teacher has" in (folder / "by-wider" / "README.md").read_text()
