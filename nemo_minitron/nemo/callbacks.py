"""The callbacks that work in anyone's own NeMo script: Importance and Pruning, on `trainer.validate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.criteria import check_norms
from nemo_minitron.importance import Collector, reduce
from nemo_minitron.importance.estimate import architecture_of
from nemo_minitron.nemo.trainer import chunks_of, leave_context


class Importance(Callback):
    """Scores of the model that `trainer.validate` runs, over its validation batches.

    `out`: where rank 0 saves them (None: they are only kept as `.scores`, the same on every rank). Of several
    criteria the first is shown, `Scores.under` gives the others; `axes`: all that the model has, unless given.
    `save_every` batches what is gathered so far is written to `partial`; `previous`: Scores of other samples of
    the same model, which are merged in. Positions whose `loss_mask` is 0 do not count, `cu_seqlens` keep samples
    apart. Hooks go when validation ends or fails; a model with hooks gives the same outputs, bit for bit.
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
        self._digest: str | None = None
        self._seen: DataStep | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "validate":
            return
        chunks = chunks_of(trainer)
        architecture = architecture_of(chunks[0])
        self._digest = model_digest(chunks, architecture)
        self._collector = Collector(chunks, architecture, self.criteria, self.axes)
        self._collector.__enter__()
        self._seen = DataStep(pl_module, self._collector)

    def on_validation_batch_start(self, *_: Any) -> None:
        if self._seen is not None:
            self._seen.begin()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int, *_: Any
    ) -> None:
        if self._collector is not None and self.partial and self.save_every and (index + 1) % self.save_every == 0:
            scores = self._reduced(self._collector)
            if torch.distributed.get_rank() == 0:
                scores.save(self.partial)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._collector is None:
            return
        self.scores = self._reduced(self._close())
        if self.out and torch.distributed.get_rank() == 0:
            self.scores.save(self.out)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._collector is not None:
            self._close()

    def _reduced(self, collector: Collector) -> Scores:
        scores = reduce(collector, self.norms)
        scores.model_digest = self._digest
        if self.previous is not None:
            scores.notes, scores.data_digest = self.previous.notes, self.previous.data_digest
            scores = self.previous.merge(scores)
        return scores

    def _close(self) -> Collector:
        collector, self._collector = self._collector, None
        assert collector is not None
        assert self._seen is not None
        collector.__exit__()
        self._seen.remove()
        return collector


class DataStep:
    """Shows a Collector each batch before NeMo's data step cuts it: masks and boundaries on every stage."""

    def __init__(self, module: Any, collector: Collector) -> None:
        name = "validation_data_step" if hasattr(module, "validation_data_step") else "data_step"
        self.module, self.name, self.collector = module, name, collector
        self._original, self._first = getattr(module, name), None
        setattr(module, name, self._step)

    def begin(self) -> None:
        """A new global batch: the first chunk's iterator comes first."""
        self._first = None

    def remove(self) -> None:
        delattr(self.module, self.name)

    def _step(self, iterator: Any) -> Any:
        self._first = self._first or iterator
        item = next(iterator)
        batch = item[0] if isinstance(item, tuple) else item
        self.collector.expect(batch, first=iterator is self._first)
        return self._original(iter([item]))


def model_digest(chunks: list[Any], architecture: Architecture) -> str:
    """The digest of a live model. Collective."""
    from nemo_minitron.nemo.live import LiveSource
    from nemo_minitron.pruning.tensors import source_digest

    return source_digest(LiveSource(chunks, architecture))


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
        from nemo_minitron.job.dry_run import target_of

        target_of(architecture_of(chunks_of(trainer)[0]), self.keep)
        super().on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._collector is None:
            return
        super().on_validation_end(trainer, pl_module)
        from nemo_minitron.nemo.students import save_student
        from nemo_minitron.search import plan

        assert self.scores is not None
        made = plan(self.scores, keep=self.keep)
        folder = Path(self.folder)
        if torch.distributed.get_rank() == 0:
            self.scores.save(folder / "scores.safetensors")
            made.save(folder / "plan.json")
        save_student(trainer, pl_module, made, folder / "student", self.teacher)
