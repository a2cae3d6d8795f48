"""The callbacks that work in anyone's own NeMo script: Importance and Pruning, on `trainer.validate`."""

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
from nemo_minitron.importance.collector import Collector
from nemo_minitron.importance.forward import architecture_of
from nemo_minitron.importance.reduction import reduce
from nemo_minitron.megatron.live import live_digest


class Importance(Callback):
    """Scores of the model that `trainer.validate` runs, over its validation batches.

    `out`: where rank 0 saves them (None: they are only kept as `.scores`, the same on every rank). Of several
    criteria the first is shown, `Scores.under` gives the others; `axes`: all that the model has, unless given.
    `save_every` batches what is gathered so far is merged, and written to `partial`, from which another run over
    the samples behind them goes on: `previous`, Scores of other samples of the same model. A run that was broken
    off after such a batch and went on ends with the same bits as one that was not. Positions whose `loss_mask` is
    0 do not count, `cu_seqlens` keep samples apart. Hooks go when validation ends or fails; a model with hooks
    gives the same outputs, bit for bit.
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
        self._collector: Collector | None = None
        self._batches = 0  # that the collector has seen
        self._digest: str | None = None
        self._seen: DataStep | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "validate":
            return
        chunks = chunks_of(trainer)
        self.scores, self._batches = self.previous, 0
        self._digest = live_digest(chunks, architecture_of(chunks[0]))
        self._seen = DataStep(trainer, self._open(chunks))

    def on_validation_batch_start(self, *_: Any) -> None:
        if self._seen is not None:
            self._seen.begin()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int, *_: Any
    ) -> None:
        if self._collector is None or self._seen is None:
            return
        self._batches += 1
        if self.save_every and self._batches == self.save_every:
            self._take()
            self._seen.collector = self._open(chunks_of(trainer))
            self._save(self.partial)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._collector is None:
            return
        self._take()
        self._close()
        self._save(self.partial)
        self._save(self.out)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._collector is not None:
            self._close()

    def _open(self, chunks: list[Any]) -> Collector:
        collector = Collector(chunks, architecture_of(chunks[0]), self.criteria, self.axes)
        self._collector = collector.__enter__()  # a refusal leaves nothing open
        return self._collector

    def _take(self) -> None:
        """Merges what the collector has gathered into `scores`. Collective."""
        assert self._collector is not None
        self._collector.__exit__()
        if not self._batches:
            return
        self._batches, new = 0, reduce(self._collector, self.norms)
        new.model_digest = self._digest
        if self.scores is not None:
            new.notes, new.data_digest = self.scores.notes, self.scores.data_digest
            new = self.scores.merge(new)
        self.scores = new

    def _save(self, path: str | None) -> None:
        if path and self.scores is not None and torch.distributed.get_rank() == 0:
            self.scores.save(path)

    def _close(self) -> None:
        collector, self._collector = self._collector, None
        assert collector is not None
        assert self._seen is not None
        collector.__exit__()
        self._seen.remove()


class DataStep:
    """Shows a Collector each batch before NeMo's data step cuts it: masks and boundaries on every stage.

    Each virtual stage is a module of its own, with a data step of its own. Several may look at one trainer's batches
    and go in any order.
    """

    def __init__(self, trainer: Any, collector: Collector) -> None:
        self.collector: Collector | None = collector
        self._first: Any = None
        self._modules = [_lightning_module(chunk) for chunk in trainer.strategy.megatron_parallel]
        first = self._modules[0]
        self.name = "validation_data_step" if hasattr(first, "validation_data_step") else "data_step"
        for module in self._modules:
            setattr(module, self.name, _Seen(self, getattr(module, self.name), self.name in vars(module)))

    def begin(self) -> None:
        """A new global batch: the first chunk's iterator comes first."""
        self._first = None

    def see(self, batch: Any, iterator: Any) -> None:
        self._first = self._first or iterator
        if self.collector is not None:
            self.collector.expect(batch, first=iterator is self._first)

    def remove(self) -> None:
        """Afterwards each module has the data step that it had; one that another still looks at, when that goes."""
        self.collector = None
        for module in self._modules:
            step, last = vars(module).get(self.name), None
            while isinstance(step, _Seen) and step.by.collector is None:
                step, last = step.original, step
            if last is not None and last.own:
                setattr(module, self.name, step)
            elif last is not None:
                delattr(module, self.name)


@dataclasses.dataclass
class _Seen:
    """NeMo's data step, looked at; `own`: the module had it as an attribute of its own, not of its class."""

    by: DataStep
    original: Any
    own: bool

    def __call__(self, iterator: Any) -> Any:
        source, item = iterator.source if isinstance(iterator, _Again) else iterator, next(iterator)
        self.by.see(item[0] if isinstance(item, tuple) else item, source)
        return self.original(_Again(source, item))


@dataclasses.dataclass
class _Again:
    """The batch once more, and the iterator that it came from."""

    source: Any
    item: Any

    def __next__(self) -> Any:
        return self.item


def _lightning_module(chunk: Any) -> LightningModule:
    while not isinstance(chunk, LightningModule):
        chunk = chunk.module
    return chunk


class Pruning(Importance):
    """At the end of `trainer.validate`: `out/scores.safetensors`, `out/plan.json` and `out/student`.

    `keep` maps an axis to the size that stays, as in `search.plan`. The student is a NeMo checkpoint of the
    model's own class, filled by reading `teacher` (a NeMo checkpoint or Hugging Face folder) through the
    plan, or, without one, the live model itself. Raises InputError for sizes that are not legal, before
    the first batch.
    """

    def __init__(self, out: str, keep: Mapping[str, int], teacher: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.folder, self.keep, self.teacher = str(out), dict(keep), teacher

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        from nemo_minitron.search.sizes import target_of

        target_of(architecture_of(chunks_of(trainer)[0]), self.keep)
        super().on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._collector is None:
            return
        super().on_validation_end(trainer, pl_module)
        from nemo_minitron.hosts.nemo.students import save_student
        from nemo_minitron.search import plan

        assert self.scores is not None
        made = plan(self.scores, keep=self.keep)
        files = RunFolder(self.folder)
        if torch.distributed.get_rank() == 0:
            self.scores.save(files.scores)
            made.save(files.plan)
        save_student(trainer, pl_module, made, files.student, self.teacher)
