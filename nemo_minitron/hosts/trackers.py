"""What `--log` names gets the numbers of a training: TensorBoard, Weights & Biases, MLflow. Rank 0 writes."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.megatron.progress import say
from nemo_minitron.settings.trackers import ENDING, wanted

PROJECT = "nemo_minitron"
Write = Callable[[Mapping[str, float], int], Any]


class Trackers:
    """The trackers of a training. A training that resumes goes on in the same run of each.

    `losses`: its loss.csv. A tracker that fails is left out, with a remark: a training is worth more than its curve.
    """

    def __init__(self, losses: Path) -> None:
        names, folder = wanted()
        self._writers: dict[str, Write] = {}
        for name in names:
            self._try(name, lambda name=name: self._writers.update({name: STARTS[name](folder, losses)}))  # type: ignore[misc]

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of a step, counted from 1."""
        for name, write in list(self._writers.items()):
            self._try(name, lambda write=write: write(values, step))  # type: ignore[misc]

    def _try(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # of a library or its server: any kind
            self._writers.pop(name, None)
            say(f"remark: --log {name} gets no more numbers: {type(error).__name__}: {error}".splitlines()[0])


def run_name(folder: Path, losses: Path) -> str:
    """The name of a training's run: what the user called its result (`--out`), and its place in that folder."""
    training, result = losses.absolute().parent, folder.parent / folder.name.removesuffix(ENDING)
    return str(training.relative_to(result.parent)) if training.is_relative_to(result) else result.name


def _kept(file: Path, new: str) -> str:
    """The id in `file`, which is `new` if there is none yet."""
    if not file.is_file():
        file.write_text(new)
    return file.read_text()


def _tensorboard(folder: Path, losses: Path) -> Write:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard" / run_name(folder, losses)))

    def write(values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()  # a worker may be ended at once

    return write


def _wandb(folder: Path, losses: Path) -> Write:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    same = _kept(losses.with_name("wandb.id"), uuid.uuid4().hex)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), name=run_name(folder, losses), id=same, resume="allow",
        dir=str(folder),
    )  # fmt: skip
    return lambda values, step: run.log(dict(values), step=step)


def _mlflow(folder: Path, losses: Path) -> Write:
    import mlflow

    folder.mkdir(parents=True, exist_ok=True)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    file = losses.with_name("mlflow.id")
    before = file.read_text() if file.is_file() else None
    run = mlflow.start_run(run_id=before, run_name=run_name(folder, losses))
    file.write_text(run.info.run_id)
    return lambda values, step: mlflow.log_metrics(dict(values), step=step)


STARTS: dict[str, Callable[[Path, Path], Write]] = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
