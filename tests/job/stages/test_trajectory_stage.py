"""A distillation in parts: where it stops, what is measured, and what a killed or changed job measures again."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.evaluation import Windows
from nemo_minitron.job import Data, Distillation, Evaluation, Job
from nemo_minitron.job.run import open_run
from nemo_minitron.job.stages import trajectory
from nemo_minitron.settings.recipe import Job as Recipe

SETTINGS = Distillation(tokens=1000, sequence_length=50, global_batch_size=2)  # ten steps of 100


@pytest.mark.parametrize(
    ("every", "start", "steps"),
    [
        (300, "pruned", [0, 3, 6, 9, 10]),
        (399, "pruned", [0, 3, 6, 9, 10]),  # whole steps
        (500, "pruned", [0, 5, 10]),
        (5000, "pruned", [0, 10]),
        (500, "random", [5, 10]),  # the pruned student is not where it starts
    ],
)
def test_marks(every, start, steps):
    settings = Distillation(tokens=1000, sequence_length=50, global_batch_size=2, start=start)
    assert trajectory.marks(settings, Evaluation(every=every)) == steps


def test_a_mark_within_a_step_is_refused():
    trajectory.check_marks(SETTINGS, Evaluation())
    trajectory.check_marks(SETTINGS, Evaluation(every=100))
    with pytest.raises(InputError, match=r"every is 99 tokens, but a step .* has 100; the nearest legal value is 100"):
        trajectory.check_marks(SETTINGS, Evaluation(every=99))


def test_the_dry_run_says_where():
    said = trajectory.describe_marks(SETTINGS, Evaluation(every=100, texts=("a",)))
    assert said == "trajectory: measured 11 times, after 0, 100, 200, ..., 1,000 tokens, on 2 texts"


@pytest.mark.parametrize("setting", [{"texts": ("a",)}, {"every_benchmarks": ("MMLU",)}])
def test_what_nothing_would_measure_is_refused(setting):
    with pytest.raises(InputError, match=r"set evaluation\.every"):
        Evaluation(**setting)
    with pytest.raises(InputError, match="names a text twice"):
        Evaluation(every=1, texts=("a", "a"))


def test_what_is_measured_on_the_way_decides_no_other_numbers():
    assert Evaluation(every=100, texts=("a",)).deciding() == Evaluation().deciding()
    assert Evaluation(tokens=100).deciding() != Evaluation().deciding()


# -- the parts ---------------------------------------------------------------------------------------------------
class Training:
    """Stands for the training and for what measures its students: the loss falls with the steps."""

    def __init__(self, run, monkeypatch):
        self.run, self.done, self.parts, self.measured = run, 0, [], []
        self.ends = self.dies = None
        monkeypatch.setattr(trajectory, "trained_steps", lambda out: self.done)
        monkeypatch.setattr(trajectory, "export_student", self.export)
        monkeypatch.setattr(trajectory, "measured", self.measure)
        monkeypatch.setattr(trajectory, "corpus_identity", str)
        monkeypatch.setattr(trajectory, "teacher_folder", lambda run: "teacher")
        texts = {"wiki": SimpleNamespace(prefix="a"), "fiction": SimpleNamespace(prefix="b")}
        monkeypatch.setattr(trajectory, "_texts", lambda run: texts)

    def train(self, step):
        if step <= self.done:
            return
        self.parts.append(step)
        self.done = min(step, self.ends or step)

    def export(self, training, student, folder):
        assert not folder.exists()
        folder.mkdir(parents=True)

    def measure(self, folder, text, settings, progress):
        if self.dies == (len(self.parts), text.prefix):
            raise KeyboardInterrupt
        self.measured.append(getattr(folder, "name", folder))
        losses = np.array([2.0, 4.0]) + (1 / (1 + self.done) if folder != "teacher" else 0)
        return SimpleNamespace(
            loss=losses.mean(), loss_error=1.0, windows=Windows(losses * 7, np.zeros((2, 7), np.int32))
        )

    def go(self, identity="t"):
        trajectory.train_along(self.run, None, SETTINGS, identity, self.train)
        return json.loads(self.run.folder.trajectory.read_text())


@pytest.fixture
def training(tmp_path, monkeypatch):
    job = Job("pico", "teacher", Data("a", "b", name="wiki"), keep={"ffn": 64}, evaluation=Evaluation(every=400))
    assert isinstance(job, Recipe)
    run = open_run(job, tmp_path / "run")
    run.folder.pruned.mkdir(parents=True)
    return Training(run, monkeypatch)


def test_each_part_ends_where_it_is_measured(training):
    found = training.go()
    assert training.parts == [4, 8, 10]
    assert training.measured == ["teacher"] * 2 + ["pruned"] * 2 + ["along"] * 6
    assert [(row["step"], row["tokens"], row["text"]) for row in found["rows"]] == [
        (step, 100 * step, text) for step in (0, 4, 8, 10) for text in ("wiki", "fiction")
    ]
    assert found["rows"][2]["losses"] == pytest.approx([2.2, 4.2])
    assert [row["losses"] for row in found["teacher"]] == [[2.0, 4.0]] * 2
    assert not training.run.folder.along.exists()
    assert training.run.folder.pruned.exists()


def test_a_job_that_is_killed_measures_no_mark_twice_and_none_by_half(training):
    """Killed between the two texts of the second mark."""
    training.dies = (2, "b")
    with pytest.raises(KeyboardInterrupt):
        training.go()
    assert [row["step"] for row in json.loads(training.run.folder.trajectory.read_text())["rows"]] == [0, 0, 4, 4]
    training.dies, training.measured = None, []
    found = training.go()
    assert training.measured == ["along"] * 4  # 8 and 10; the checkpoint of 8 was still there
    assert training.parts == [4, 8, 10]
    assert [row["step"] for row in found["rows"]] == [0, 0, 4, 4, 8, 8, 10, 10]
    training.measured = []
    training.go()
    assert training.measured == []


def test_marks_of_another_training_are_forgotten(training):
    training.go()
    training.done, training.measured = 0, []
    training.go("other")
    assert len(training.measured) == 10


def test_a_training_that_ends_early_is_measured_where_it_ended(training):
    training.ends = 6
    found = training.go()
    assert [row["step"] for row in found["rows"]] == [0, 0, 4, 4, 6, 6]


def test_a_mark_that_was_passed_is_left_out_and_said(training, capsys):
    """The file was deleted after the training had gone on: a later student is not measured in its place."""
    training.done = 9
    found = training.go()
    assert [row["step"] for row in found["rows"]] == [0, 0, 10, 10]
    assert "step 4 was passed" in capsys.readouterr().out
    training.done = 0  # trained anew, after its folder was removed
    assert [row["step"] for row in training.go()["rows"]] == [0, 0, 4, 4, 8, 8, 10, 10]


def test_tasks_are_measured_with_their_errors(training, monkeypatch):
    evaluation = Evaluation(every=500, every_benchmarks=("one",))
    training.run.job = training.run.job.override(["evaluation.every=500", "evaluation.every_benchmarks=one"])
    row = {"acc,none": 0.25, "acc_stderr,none": 0.01, "bleu,none": 3.0}
    monkeypatch.setattr("nemo_minitron.evaluation.run_tasks", lambda *given, **more: {"one": row})
    found = training.go()
    assert training.run.job.evaluation == evaluation
    assert [task["step"] for task in found["tasks"]] == [0, 0, 5, 5, 10, 10]
    assert found["tasks"][0] == {
        "step": 0, "tokens": 0, "task": "one", "metric": "acc,none", "value": 0.25, "error": 0.01,
    }  # fmt: skip
    assert found["tasks"][1]["error"] is None
