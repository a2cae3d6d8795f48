"""The callbacks Importance and Pruning, for a user's own NeMo script. They work on `trainer.validate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback

from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.criteria import check_norms
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.hosts.nemo.trainer import chunks_of, leave_context
from nemo_minitron.hosts.scoring import Gathering, check_student
from nemo_minitron.importance.collector import Collector


class Importance(Callback):
    """Scores the units of the model that `trainer.validate` runs, on its validation batches.

    Arguments:
    - `out`: the file to which rank 0 saves the scores. Without it they are only in the attribute `scores`, which is the
      same on every rank.
    - `criterion`: one criterion or several. `scores` shows the first one; `Scores.under` gives the others.
    - `axes`: what to score; all axes that the model has by default.
    - `save_every`: after so many batches, what was gathered is merged into `scores` and saved to `partial`. A run that
      was killed later can resume from that file.
    - `previous`: Scores of other samples of the same model, to which those of this validation are added. A run that
      resumes with the saved file, on the samples that are left, ends with the same bits as a run that was not killed.

    Positions whose `loss_mask` is 0 do not count. `cu_seqlens` marks where the samples of a packed row begin. The hooks
    are removed when the validation ends or fails. They do not change the model's outputs by a bit.

    Raises InputError for a criterion, an axis or `norms` that does not exist.
    """

    def __init__(
        self, out: str | None = None, criterion: str | Sequence[str] = "l2,mean", norms: str = "all",
        axes: Sequence[str] | None = None, save_every: int = 0, partial: str | None = None,
        previous: Scores | None = None,
    ) -> None:  # fmt: skip
        check_norms(norms)
        self.criteria = [criterion] if isinstance(criterion, str) else list(criterion)
        self.out, self.norms, self.axes = out, norms, None if axes is None else tuple(axes)
        self.save_every, self.partial, self.previous = save_every, partial, previous
        self.scores: Scores | None = None
        self._gathering: Gathering | None = None
        self._data_step: DataStep | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "validate":
            return
        # If the collector refuses the model here, there is nothing to close.
        self._gathering = Gathering(chunks_of(trainer), self.criteria, self.norms, self.axes, self.previous)
        self.scores = self.previous
        self._data_step = DataStep(trainer, self._gathering.collector)

    def on_validation_batch_start(self, *_: Any) -> None:
        if self._data_step is not None:
            self._data_step.begin()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int, *_: Any
    ) -> None:
        if self._gathering is None or self._data_step is None:
            return
        self._gathering.batches += 1
        if self.save_every and self._gathering.batches == self.save_every:
            self._gathering.merge()
            self._data_step.collector = self._gathering.open()
            self._gathering.save(self.partial)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._gathering is None:
            return
        gathering = self._gathering
        gathering.merge()
        self._close()
        self.scores = gathering.scores
        gathering.save(self.partial)
        gathering.save(self.out)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._gathering is not None:
            self._close()

    def _close(self) -> None:
        gathering, self._gathering = self._gathering, None
        assert gathering is not None
        assert self._data_step is not None
        gathering.close()
        self._data_step.remove()


class DataStep:
    """Shows a Collector each batch before NeMo's data step cuts it. The collector needs the masks and the boundaries of
    the samples on every pipeline stage, and NeMo drops them on the middle ones.

    Each virtual stage is a module with a data step. Several DataSteps may watch one trainer, and they may be removed in
    any order.
    """

    def __init__(self, trainer: Any, collector: Collector) -> None:
        self.collector: Collector | None = collector
        self._first: Any = None
        self._modules = [_lightning_module(chunk) for chunk in trainer.strategy.megatron_parallel]
        first = self._modules[0]
        self.name = "validation_data_step" if hasattr(first, "validation_data_step") else "data_step"
        for module in self._modules:
            setattr(module, self.name, _WatchedStep(self, getattr(module, self.name), self.name in vars(module)))

    def begin(self) -> None:
        """Called before each global batch: Megatron's schedule reads the first chunk's iterator first."""
        self._first = None

    def see(self, batch: Any, iterator: Any) -> None:
        """Shows the collector a batch and says whether the first chunk of this rank reads it."""
        self._first = self._first or iterator
        if self.collector is not None:
            self.collector.expect(batch, first=iterator is self._first)

    def remove(self) -> None:
        """Gives each module its own data step back. If another DataStep still watches the module, that one does it when
        it is removed."""
        self.collector = None
        for module in self._modules:
            step, outermost = vars(module).get(self.name), None
            while isinstance(step, _WatchedStep) and step.watcher.collector is None:
                step, outermost = step.original, step
            if outermost is not None and outermost.on_instance:
                setattr(module, self.name, step)
            elif outermost is not None:
                delattr(module, self.name)


@dataclasses.dataclass
class _WatchedStep:
    """A data step that shows each batch to its watcher first. `on_instance`: the original is an attribute of the module
    itself, not of its class."""

    watcher: DataStep
    original: Any
    on_instance: bool

    def __call__(self, iterator: Any) -> Any:
        source, item = iterator.source if isinstance(iterator, _Replay) else iterator, next(iterator)
        self.watcher.see(item[0] if isinstance(item, tuple) else item, source)
        return self.original(_Replay(source, item))


@dataclasses.dataclass
class _Replay:
    """An iterator that returns the batch again, with the iterator that the batch came from."""

    source: Any
    item: Any

    def __next__(self) -> Any:
        return self.item


def _lightning_module(chunk: Any) -> LightningModule:
    """The LightningModule inside of the wrappers of a chunk of `megatron_parallel`."""
    while not isinstance(chunk, LightningModule):
        chunk = chunk.module
    return chunk


class Pruning(Importance):
    """Scores a model and cuts it: `trainer.validate` ends with `out/scores.safetensors`, `out/plan.json` and
    `out/student`.

    `keep` maps an axis to the size that stays, as in `search.plan`. The student is a NeMo checkpoint of the model's own
    class. Its weights are read from `teacher` (a NeMo checkpoint or a Hugging Face folder), or from the live model if
    no teacher is given. The other options are those of `Importance`.

    Raises InputError for sizes that are not legal, or in which the student cannot run in this layout, before the first
    batch.
    """

    def __init__(self, out: str, keep: Mapping[str, int], teacher: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.folder, self.keep, self.teacher = str(out), dict(keep), teacher

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        check_student(chunks_of(trainer)[0], self.keep)
        super().on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._gathering is None:
            return
        super().on_validation_end(trainer, pl_module)
        from nemo_minitron.hosts.nemo.students import save_student
        from nemo_minitron.search import plan

        assert self.scores is not None
        cut = plan(self.scores, keep=self.keep)
        files = RunFolder(self.folder)
        if torch.distributed.get_rank() == 0:
            self.scores.save(files.scores)
            cut.save(files.plan)
        save_student(trainer, pl_module, cut, files.student, self.teacher)
