"""`minitron compress` and `distill` on a pico model, from the command line to the student, killed on the way."""

import csv
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from command_line import exported_as_is, losses, minitron, moved, plain, start
from pico import raw_tensors

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import prune
from nemo_minitron.search import compare_plans, random_plan

pytestmark = pytest.mark.slow


def test_the_run_folder_is_whole(world):
    run = world / "run"
    names = {"recipe.json", "manifest.json", "scores.safetensors", "plan.json", "numbers.json", "report.html"}
    assert names | {"checkpoints", "student", "figures", "log.txt"} <= {path.name for path in run.iterdir()}
    rows = json.loads((run / "numbers.json").read_text())
    assert [row["stage"] for row in rows] == ["teacher", "random", "sliced", "pruned", "distilled"]
    assert rows[2]["loss"] != rows[3]["loss"]  # without the re-fitted matrices, and with them
    assert not (run / "checkpoints" / "sliced").exists()
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert len(json.loads((run / "manifest.json").read_text())["stages"]) == 11
    assert len(losses(run / "checkpoints" / "distilled" / "loss.csv")) == 6
    card = (run / "student" / "README.md").read_text()
    assert "base_model" in card
    assert "5 matrices that lost inputs to the cut, re-fitted by least squares, ridge 0.01, on 4 samples of 36" in card


def test_the_student_loads_and_generates_with_transformers(world):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = world / "run" / "student"
    model = AutoModelForCausalLM.from_pretrained(student, trust_remote_code=False)
    assert model.num_parameters() == from_hf(student).parameters()
    assert model.dtype == torch.float32
    tokens = AutoTokenizer.from_pretrained(student)("the model", return_tensors="pt")
    assert model.generate(tokens["input_ids"], max_new_tokens=4).shape[1] > tokens["input_ids"].shape[1]


def test_weights_were_trained_and_everything_else_is_the_pruned_folder(world):
    student, pruned = raw_tensors(world / "run" / "student"), raw_tensors(world / "run" / "checkpoints" / "pruned")
    assert student.keys() == pruned.keys()
    assert all(not np.array_equal(student[name], pruned[name]) for name in student)


@pytest.fixture(scope="module")
def rooms(world):
    """Of this package, what is loaded where NeMo alone exports the distilled checkpoint and trains it on."""
    return {name.split(".")[1] for name in plain(world, "cpu") if "." in name}


def test_nemos_own_exporter_needs_backend_setup_alone(world, rooms):
    """The distilled checkpoint is a plain NeMo checkpoint: its export has the student's tensors, bit for bit."""
    assert "backend" in rooms <= {"backend", "errors", "precisions"}  # the others are single files that it needs
    assert exported_as_is(world)


def test_nemo_alone_trains_the_student_on(world, rooms):
    """Two steps of Adam move no weight by much more than twice the learning rate, 1e-4; had the weights not been
    loaded, or not been trained, they would differ by their own size, about 0.1, or not at all."""
    assert {name: by for name, by in moved(world).items() if not 0 < by < 1e-3} == {}


def test_a_rerun_does_nothing(world):
    shutil.copytree(world / "run", world / "again")
    output = minitron(world, "compress", "recipe.py", "--out", "again")
    assert output.count("done before, skipped") == 11


def test_the_student_learns_what_the_teacher_wrote(world):
    """The finished run once more, with a text to be written: what comes before it stays, what comes after is anew."""
    shutil.copytree(world / "run", world / "written")
    asked = ["generation.documents=24", "generation.prompt_tokens=8", "generation.new_tokens=40"]
    loss = ["distillation.logits_weight=0", "distillation.lm_weight=1"]
    output = minitron(world, "compress", "recipe.py", "--out", "written", "--overwrite", *asked, *loss)
    assert output.count("done before, skipped") == 7
    assert "[8/12] generate ..." in output
    data, training = world / "written" / "data", world / "written" / "checkpoints" / "distilled"
    record = json.loads((data / "generation.json").read_text())
    assert record["documents"] + record["empty"] == 24
    assert len((data / "generated.jsonl").read_text().splitlines()) == record["documents"]
    read = {json.loads(file.read_text())["dataset_path"] for file in (training / "index").rglob("*description.txt")}
    assert read == {"written/data/generated"}
    assert len(losses(training / "loss.csv")) == 6


def test_killed_in_distillation_it_goes_on_and_ends_with_the_same_losses(world):
    """SIGKILL to the whole session after the first checkpoint; the second run resumes from it. What comes before the
    distillation is the finished run's."""
    shutil.copytree(world / "run", world / "killed")
    shutil.rmtree(world / "killed" / "checkpoints" / "distilled")
    shutil.rmtree(world / "killed" / "student")
    process = start(world, "compress", "recipe.py", "--out", "killed")
    checkpoints = world / "killed" / "checkpoints" / "distilled" / "nemo" / "checkpoints"
    deadline = time.monotonic() + 300
    while not any(checkpoints.glob("*-last")) or any(checkpoints.glob("*-unfinished")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout.read()[-4000:]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = losses(world / "killed" / "checkpoints" / "distilled" / "loss.csv")
    assert not (world / "killed" / "student").exists()
    log = world / "killed" / "checkpoints" / "distilled" / "loss.csv"
    rows = log.read_text().splitlines()
    rows[1] = rows[1].rsplit(",", 1)[0] + ",1234.50"  # a mark: only a run that resumes keeps this row
    log.write_text("\n".join(rows) + "\n")
    (checkpoints / "step=9-last").mkdir()  # as a kill in the middle of a save leaves them
    (checkpoints / "step=9-last-unfinished").touch()
    output = minitron(world, "compress", "recipe.py", "--out", "killed")
    assert "[2/11] estimate: done before, skipped" in output
    assert "[8/11] distill ..." in output
    after = losses(world / "killed" / "checkpoints" / "distilled" / "loss.csv")
    assert len(after) == 6
    assert log.read_text().splitlines()[1].endswith(",1234.50")
    assert len(before) >= 2
    assert after[:2] == before[:2]
    straight = losses(world / "run" / "checkpoints" / "distilled" / "loss.csv")
    np.testing.assert_allclose(after, straight, rtol=1e-5)


def test_three_tensor_parallel_ranks_give_the_same_scores_plan_and_losses(world):
    """The same recipe in three processes, with sequence parallelism; 509 tokens do not divide by three."""
    from tolerances import LOSS_LAYOUT_FP32, SCORES_FP32

    minitron(world, "compress", "recipe.py", "--out", "tp3", "--tp", "3", "--sp")
    one, three = (Scores.load(world / run / "scores.safetensors") for run in ("run", "tp3"))
    for name, expected in one.tensors.items():
        largest = np.abs(expected).max(axis=-1, keepdims=True)
        assert (np.abs(three[name] - expected) / largest).max() < SCORES_FP32, name
    plans = [PrunePlan.load(world / run / "plan.json") for run in ("run", "tp3")]
    _, inside, outside = compare_plans(*plans, one, 2 * SCORES_FP32)
    print(f"units that differ within the tolerance of their threshold: {inside}")
    assert outside == 0
    one_loss, three_loss = (losses(world / r / "checkpoints" / "distilled" / "loss.csv") for r in ("run", "tp3"))
    np.testing.assert_allclose(three_loss, one_loss, rtol=LOSS_LAYOUT_FP32)


def test_distill_command_leaves_a_folder_with_its_losses(world):
    plan = random_plan(from_hf(world / "teacher"), keep={"ffn": 64})
    prune(world / "teacher", plan, world / "student-in")
    settings = ["--tokens", 128, "--sequence-length", 32, "--precision", "fp32", "--data", "corpus.jsonl"]
    minitron(world, "distill", "student-in", "--teacher", "teacher", *settings, "--out", "student-out")
    rows = list(csv.DictReader((world / "student-out" / "loss.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert list(rows[0]) == ["step", "tokens", "loss", "seconds"]
    assert from_hf(world / "student-out") == plan.target
    made = world / "student-out" / "config.json"
    before = made.stat().st_mtime_ns, raw_tensors(world / "student-out")
    minitron(world, "distill", "student-in", "--teacher", "teacher", *settings, "--out", "student-out")
    assert made.stat().st_mtime_ns == before[0]  # a finished training is not begun again
    assert not (world / ".student-out.work").exists()
    after = raw_tensors(world / "student-out")
    assert all(np.array_equal(after[name], tensor) for name, tensor in before[1].items())
    other = world / "other.jsonl"
    other.write_text((world / "corpus.jsonl").read_text().replace("words", "lines"))
    minitron(world, "distill", "student-in", "--teacher", "teacher", *settings[:-1], other, "--out", "student-out")
    changed = raw_tensors(world / "student-out")
    assert not all(np.array_equal(changed[name], tensor) for name, tensor in after.items())  # other text, other student
