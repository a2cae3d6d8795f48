"""`--log`: what TensorBoard, Weights & Biases and MLflow get of a training; here without their servers."""

import sys
import types
from pathlib import Path

import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.hosts.losses import Losses
from nemo_minitron.settings import trackers


@pytest.fixture
def training(tmp_path, monkeypatch):
    """The hidden folder of a `minitron distill --out student`, in a process that was told nothing yet."""
    for name in (trackers.LOG, trackers.FOLDER):
        monkeypatch.setenv(name, "")  # so that what `track` sets is undone
    work = tmp_path / ".student.work" / "training"
    work.mkdir(parents=True)
    return work


def train(folder, done=0):
    losses = Losses(folder / "loss.csv", 100, steps=4, done=done, names=["logits"])
    for step in range(done + 1, 3):
        losses.row(step, 2.0 / step, {"logits": 1.0 / step})
    losses.held_out(2, 3.0)


def installed(monkeypatch, name, module):
    module.__spec__ = types.SimpleNamespace()  # what find_spec looks at
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard(training, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers.track("tensorboard", tmp_path / "student")
    train(training)
    events = EventAccumulator(str(tmp_path / "student-logs" / "tensorboard" / "student")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]
    assert [event.value for event in events.Scalars("logits")] == [1.0, 0.5]
    assert [event.value for event in events.Scalars("held_out_loss")] == [3.0]


def test_wandb_goes_on_in_the_same_run(training, tmp_path, monkeypatch):
    started, rows = [], []
    run = types.SimpleNamespace(log=lambda values, step: rows.append((step, values)))
    module = types.ModuleType("wandb")
    module.init = lambda **options: started.append(options) or run
    installed(monkeypatch, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.track("wandb", tmp_path / "student")
    train(training)
    train(training, done=1)
    assert [(o["name"], o["project"], o["resume"]) for o in started] == [("student", "nemo_minitron", "allow")] * 2
    assert started[0]["id"] == started[1]["id"]
    assert rows[0] == (1, {"loss": 2.0, "tokens": 100, "logits": 1.0})
    assert [step for step, _ in rows] == [1, 2, 2, 2, 2]


def test_mlflow_and_a_tracker_that_fails(training, tmp_path, monkeypatch, capsys):
    rows, runs = [], []
    module = types.ModuleType("mlflow")
    module.set_tracking_uri, module.set_experiment = runs.append, runs.append
    info = types.SimpleNamespace(info=types.SimpleNamespace(run_id="17"))
    module.start_run = lambda **options: runs.append(options) or info

    def log_metrics(values, step):
        rows.append(step)
        raise ConnectionError("the server is gone\nand more")

    module.log_metrics = log_metrics
    installed(monkeypatch, "mlflow", module)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    trackers.track("mlflow", tmp_path / "student")
    train(training)
    assert rows == [1]  # and the training went on
    assert runs[0] == f"sqlite:///{tmp_path / 'student-logs' / 'mlflow.db'}"
    assert runs[2] == {"run_id": None, "run_name": "student"}
    assert "--log mlflow gets no more numbers: ConnectionError: the server is gone\n" in capsys.readouterr().out
    assert (training / "loss.csv").read_text().count("\n") == 3
    train(training)
    assert runs[5]["run_id"] == "17"


def test_the_parts_of_a_job_have_names_of_their_own(tmp_path):
    from nemo_minitron.hosts.trackers import run_name

    folder = tmp_path / "demo-logs"
    assert run_name(folder, tmp_path / "demo" / "search" / "a" / "distilled" / "loss.csv") == "demo/search/a/distilled"


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("wandb,tensorbord", "--log has no tracker 'tensorbord'; did you mean 'tensorboard'"),
        ("mlflow", "mlflow is not installed; run: pip install mlflow"),
        ("wandb", "there is no login; run: wandb login, or set WANDB_MODE=offline"),
    ],
)
def test_what_cannot_be_tracked_is_refused(training, tmp_path, monkeypatch, log, words):
    found = {"tensorboard": object(), "wandb": object()}.get
    monkeypatch.setattr(trackers.importlib.util, "find_spec", found)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(InputError, match=words):
        trackers.track(log, Path("student"))
