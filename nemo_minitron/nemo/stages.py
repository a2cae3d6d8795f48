"""A Job's heaviest stage as NeMo runs it: distill is `llm.train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nemo_minitron.backend as backend
from nemo_minitron.families import read_config
from nemo_minitron.job.layout import Layout
from nemo_minitron.job.recipe import Distillation
from nemo_minitron.nemo.trainer import logger, make_trainer, optimizer, resume, training_strategy

LAST = "last"


def distill(settings: dict[str, Any]) -> None:
    """`student` (HF folder), `teacher`, `train`, `validation` (prefixes), `out`, `distillation`, `layout`:
    trains to `out/checkpoints/last` (a NeMo checkpoint) with `out/loss.csv`; goes on where it stopped. `stop`, where
    it is given, is the step after which it ends for now."""
    backend.setup()
    from nemo.collections import llm

    from nemo_minitron.nemo.data import data_module
    from nemo_minitron.nemo.distill import Distillation as DistillationCallback
    from nemo_minitron.nemo.distill import FillStudent, LossLog
    from nemo_minitron.nemo.models import nemo_model
    from nemo_minitron.nemo.stop import StopAfter

    recipe, layout = Distillation(**settings["distillation"]), Layout(**settings["layout"])
    data = data_module(
        settings["train"], settings["validation"], tokenizer=settings["student"], seed=recipe.seed,
        sequence_length=recipe.sequence_length, micro_batch_size=recipe.micro_batch_size,
        global_batch_size=recipe.global_batch_size, index_folder=settings["index"],
    )  # fmt: skip
    optim = optimizer(recipe)
    trainer = make_trainer(
        layout, recipe.precision, max_steps=recipe.steps, limit_val_batches=0, val_check_interval=None,
        check_val_every_n_epoch=None, log_every_n_steps=1, strategy=training_strategy(),
    )  # fmt: skip
    model = nemo_model(
        read_config(settings["student"]), tokenizer=data.tokenizer, precision=recipe.precision, layout=layout,
        optim=optim,
    )  # fmt: skip
    tokens = recipe.sequence_length * recipe.global_batch_size
    trainer.callbacks[:0] = [  # before NeMo's checkpoint callback: a saved step is a logged step
        FillStudent(settings["student"]),
        DistillationCallback(settings["teacher"], recipe.loss, recipe.temperature, recipe.precision),
        LossLog(str(Path(settings["out"]) / "loss.csv"), tokens),
        *([StopAfter(settings["stop"])] if settings.get("stop") else []),
    ]
    llm.train(model, data, trainer, log=logger(settings["out"], recipe), resume=resume(), optim=optim)
    _mark_last(trainer, Path(settings["out"]))


def _mark_last(trainer: Any, out: Path) -> None:
    """Writes down where the last checkpoint lies, for the stage that comes after."""
    if trainer.is_global_zero:
        from nemo.lightning.ckpt_utils import ckpt_to_dir

        path = Path(ckpt_to_dir(trainer.checkpoint_callback.last_model_path))
        (out / f"{LAST}.json").write_text(json.dumps({"checkpoint": str(path.resolve().relative_to(out.resolve()))}))
