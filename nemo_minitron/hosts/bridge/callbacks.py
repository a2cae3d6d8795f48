"""The callbacks Importance and Pruning, for a user's own Bridge script. They work on a validation without training."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.losses import masked_next_token_loss

from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.criteria import check_norms
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.hosts.bridge.distill import micro_batch, model_inputs
from nemo_minitron.hosts.scoring import Gathering, check_student


class Importance(Callback):
    """Scores the units of the model that Bridge's `pretrain` validates, on the batches of the validation:

        importance = Importance("scores.safetensors")
        config.validation.skip_train = True
        pretrain(config, importance.forward_step, callbacks=[importance])

    Arguments:
    - `out`: the file to which rank 0 saves the scores. Without it they are only in the attribute `scores`, which is the
      same on every rank.
    - `criterion`: one criterion or several. `scores` shows the first one; `Scores.under` gives the others.
    - `axes`: what to score; all axes that the model has by default.
    - `previous`: Scores of other samples of the same model, to which those of this validation are added.

    Positions whose `loss_mask` is 0 do not count. The hooks are removed when the validation ends. A validation within a
    training is not scored. Raises InputError for a criterion, an axis or `norms` that does not exist.
    """

    def __init__(
        self, out: str | None = None, criterion: str | Sequence[str] = "l2,mean", norms: str = "all",
        axes: Sequence[str] | None = None, previous: Scores | None = None,
    ) -> None:  # fmt: skip
        check_norms(norms)
        self.criteria = [criterion] if isinstance(criterion, str) else list(criterion)
        self.out, self.norms, self.axes = out, norms, None if axes is None else tuple(axes)
        self.scores = previous
        self._gathering: Gathering | None = None

    def forward_step(self, state: Any, data_iterator: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
        """Bridge's forward step. It shows each micro-batch to the callback before it is cut for this rank."""
        chunk, item = unwrap(model), next(data_iterator)
        if self._gathering is not None:
            self._gathering.collector.expect(item, first=not chunk.vp_stage)
        batch = micro_batch(iter([item]))
        output = model(**model_inputs(batch), labels=batch["labels"])
        reduce = functools.partial(masked_next_token_loss, batch["loss_mask"], check_for_nan_in_loss=False)
        return output, reduce

    def on_eval_start(self, context: Any) -> None:
        if context.state.cfg.validation.skip_train:
            chunks = [unwrap(chunk) for chunk in context.model]
            self._gathering = Gathering(chunks, self.criteria, self.norms, self.axes, self.scores)

    def on_eval_step_end(self, context: Any) -> None:
        if self._gathering is not None:
            self._gathering.batches += 1

    def on_eval_end(self, context: Any) -> None:
        gathering, self._gathering = self._gathering, None
        if gathering is not None:
            gathering.merge()
            gathering.save(self.out)
            self.scores = gathering.scores


class Pruning(Importance):
    """Scores a model and cuts it: the validation ends with `out/scores.safetensors`, `out/plan.json` and `out/student`.

    `keep` maps an axis to the size that stays, as in `search.plan`. The student is a checkpoint of Megatron-Bridge. Its
    weights are read from `teacher` (a Hugging Face folder or a checkpoint), or from the live model if no teacher is
    given. The other options are those of `Importance`.

    Raises InputError for sizes that are not legal, or in which the student cannot run in this layout, before the first
    batch; and for a model that no family of this package is.
    """

    def __init__(self, out: str, keep: Mapping[str, int], teacher: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.folder, self.keep, self.teacher = str(out), dict(keep), teacher

    def on_eval_start(self, context: Any) -> None:
        check_student(unwrap(context.model[0]), self.keep)
        super().on_eval_start(context)

    def on_eval_end(self, context: Any) -> None:
        scoring = self._gathering is not None
        super().on_eval_end(context)
        if not scoring:
            return
        from nemo_minitron.hosts.bridge.students import save_student
        from nemo_minitron.search import plan

        assert self.scores is not None
        cut, files = plan(self.scores, keep=self.keep), RunFolder(self.folder)
        if torch.distributed.get_rank() == 0:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            self.scores.save(files.scores)
            cut.save(files.plan)
        tokenizer = context.state.cfg.tokenizer.tokenizer_model
        save_student([unwrap(chunk) for chunk in context.model], cut, files.student, tokenizer, self.teacher)
