"""The callbacks that work in anyone's own NeMo script: Importance and Pruning, on `trainer.validate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from nemo_minitron.artifacts import Scores
from nemo_minitron.importance import Collector, reduce
from nemo_minitron.importance.collector import WIDTH_AXES
from nemo_minitron.importance.estimate import architecture_of
from nemo_minitron.importance.statistics import check_norms
from nemo_minitron.nemo.trainer import chunks_of, leave_context


class Importance(Callback):
    """Scores of the model that `trainer.validate` runs, over its validation batches.

    `out`: where rank 0 saves them (None: they are only kept as `.scores`, the same on every rank).
    Hooks go when validation ends or fails; a model with hooks gives the same outputs, bit for bit.
    """

    def __init__(
        self, out: str | None = None, criterion: str = "l2,mean", norms: str = "all",
        axes: tuple[str, ...] = (*WIDTH_AXES, "layers"),
    ) -> None:  # fmt: skip
        check_norms(norms)
        self.out, self.criterion, self.norms, self.axes = out, criterion, norms, tuple(axes)
        self.scores: Scores | None = None
        self._collector: Collector | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "validate":
            return
        chunks = chunks_of(trainer)
        self._collector = Collector(chunks, architecture_of(chunks[0]), self.criterion, self.axes)
        self._collector.__enter__()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._collector is None:
            return
        collector = self._close()
        self.scores = reduce(collector, self.norms)
        self.scores.model_digest = self.model_digest(trainer)
        if self.out and torch.distributed.get_rank() == 0:
            self.scores.save(self.out)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._collector is not None:
            self._close()

    def _close(self) -> Collector:
        collector, self._collector = self._collector, None
        assert collector is not None
        collector.__exit__()
        return collector

    def model_digest(self, trainer: Any) -> str:
        """The digest of the live model. Collective."""
        from nemo_minitron.nemo.live import LiveSource
        from nemo_minitron.pruning.tensors import source_digest

        assert self.scores is not None
        return source_digest(LiveSource(chunks_of(trainer), self.scores.architecture))


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
