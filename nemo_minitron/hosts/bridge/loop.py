"""Bridge's training loop with this package's data, and what it leaves for the stage that comes next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback, normalize_callbacks
from megatron.core import parallel_state

from nemo_minitron.artifacts.files import write_json
from nemo_minitron.artifacts.run_folder import TrainingFolder
from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.hosts.bridge.distill import Distillation
from nemo_minitron.hosts.bridge.guard import LOSS, StopWhenNotFinite
from nemo_minitron.hosts.bridge.load import load_training
from nemo_minitron.hosts.bridge.models import say_vocabulary
from nemo_minitron.hosts.bridge.stop import Stop
from nemo_minitron.hosts.losses import Losses
from nemo_minitron.megatron.shutdown import SAVED
from nemo_minitron.settings.distillation import Distillation as Recipe
from nemo_minitron.sources.bridge_config import name_of


class Watch(Callback):
    """Logs the losses of a training, and ends it early when the held-out loss does not fall any more."""

    def __init__(self, out: Path, recipe: Recipe, distillation: Distillation | None = None) -> None:
        self.out, self.recipe, self.distillation = out, recipe, distillation
        self.stop: Stop | None = None
        self.held_out: Any = None
        self._losses: Losses | None = None

    def on_train_start(self, context: Any) -> None:
        if torch.distributed.get_rank() == 0:
            names = self.distillation.names if self.distillation else ()
            done = context.state.train_state.step
            path = TrainingFolder(self.out).losses
            self._losses = Losses(path, self.recipe.tokens_per_step, self.recipe.steps, done, names)

    def on_train_step_end(self, context: Any) -> None:
        loss = _of_last_stage(context.loss_dict)
        if self._losses is not None:
            parts = self.distillation.parts if self.distillation else {}
            self._losses.row(context.state.train_state.step + 1, loss, parts)

    def on_eval_start(self, context: Any) -> None:
        self.held_out.begin()

    def on_eval_end(self, context: Any) -> None:
        loss = _of_last_stage(context.total_loss_dict)
        if self._losses is None or self.stop is None:
            return
        self._losses.held_out(context.state.train_state.step, loss)
        self.stop.wanted = bool(self.recipe.patience) and self._losses.stale() >= self.recipe.patience


def _of_last_stage(losses: dict[str, torch.Tensor] | None) -> float:
    """The loss on every rank of a pipeline; only its last stage has one. Collective over the pipeline."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loss = (losses or {}).get(LOSS, torch.zeros(())).detach().to(device, torch.float32).reshape(1).clone()
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(loss, last, group=parallel_state.get_pipeline_model_parallel_group())
    return float(loss)


class _Checked:
    """Bridge's manager of checkpoints. It checks the weights, and saves what belongs to a checkpoint, before that
    checkpoint becomes the newest one."""

    def __init__(self, inner: Any, guard: StopWhenNotFinite, distillation: Distillation | None) -> None:
        self._inner, self._guard, self._distillation = inner, guard, distillation

    def save(self, context: Any, callbacks: Any) -> None:
        step = context.state.train_state.step
        self._guard.check_weights(step, [unwrap(chunk) for chunk in context.model])
        if self._distillation is not None:
            self._distillation.save_state(context.state.cfg.checkpoint.save, step)
        self._inner.save(context, callbacks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def run(
    config: Any, forward_step: Callable[..., Any], callbacks: Sequence[Callback], *, watch: Watch,
    datasets: Callable[..., Any], vocab_size: int,
    held_out: Callable[[Any], Any] | None = None, stop: int | None = None,
) -> None:  # fmt: skip
    """Trains until the last step, or until step `stop`; from the last checkpoint in `config.checkpoint.load`, if there
    is one. Collective.

    `datasets`: Bridge's provider of datasets; `held_out`: gives the batches of the validation for a data-parallel
    group, or None. `vocab_size`: the model's, without padding. Leaves `last.json` in the folder of `watch`. Raises
    SystemExit with the code SAVED if the training was told to stop.
    """
    train = load_training()
    from megatron.bridge.training.config import runtime_config_update
    from megatron.bridge.training.setup import setup
    from megatron.bridge.training.state import GlobalState

    runtime_config_update(config)
    state = GlobalState()
    state.cfg = config
    guard = StopWhenNotFinite()
    manager = normalize_callbacks([*callbacks, guard, watch])
    made = setup(state, datasets, callback_manager=manager)
    say_vocabulary(config.model, vocab_size)
    watch.held_out = held_out(made.pg_collection.dp) if held_out else None
    state.train_state.do_valid = watch.held_out is not None
    watch.stop = state._signal_handler = Stop(state, stop)
    if state.train_state.step < config.train.train_iters:
        try:
            train.train(
                forward_step, made.model, made.optimizer, made.scheduler, made.train_data_iterator, watch.held_out,
                state, _Checked(made.checkpoint_manager, guard, watch.distillation), made.pg_collection,
                callback_manager=manager,
            )  # fmt: skip
        except SystemExit:  # Bridge's loop leaves in this way when it is told to stop
            if not watch.stop.ended:
                raise
        finally:
            guard.close()
            if watch.distillation is not None:
                watch.distillation.close()
    if watch.stop.asked:
        torch.distributed.barrier()  # torchrun ends the other ranks as soon as one has left
        raise SystemExit(SAVED)
    _mark_last(watch.out, state.train_state.step, stop or config.train.train_iters)


def _mark_last(out: Path, step: int, steps: int) -> None:
    """Writes `last.json`: the last checkpoint's path, relative to `out`, and the number of steps if the training ended
    before `steps`. Rank 0 writes."""
    if torch.distributed.get_rank() == 0:
        path = TrainingFolder(out).bridge / name_of(step)
        early = {"stopped": step} if step < steps else {}
        write_json(TrainingFolder(out).last, {"checkpoint": str(path.resolve().relative_to(out.resolve())), **early})
