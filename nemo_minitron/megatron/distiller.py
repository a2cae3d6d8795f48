"""A distillation beside any training loop of Megatron models: a host calls these hooks from its own.

`prepare` before the model is built, `begin` once it is filled; then `forward` and `data_step` take the place of the
loop's own, `before_step` and `after_step` stand around each step's schedule, and `state` goes into its checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.distillation.intermediate import Intermediate
from nemo_minitron.distillation.layer_map import layer_map
from nemo_minitron.distillation.meter import Meter
from nemo_minitron.distillation.projection import Projection
from nemo_minitron.distillation.routers import ROUTERS, routers_loss, set_routers_loss
from nemo_minitron.distillation.step import Objective, distillation_step
from nemo_minitron.distillation.teacher import Inputs, Teacher
from nemo_minitron.errors import InputError
from nemo_minitron.importance.forward import architecture_of
from nemo_minitron.megatron.groups import current_layout
from nemo_minitron.megatron.load import Build, load
from nemo_minitron.sources.open import open_source

DataStep = Callable[[Any], Any]  # an iterator of micro-batches -> what the forward step is given of the next one


@dataclasses.dataclass
class Distiller:
    """What the student learns from, and how: the values of `settings.Distillation`, where they are not the host's.

    `inputs`: what a model is given of a micro-batch, but for the labels. `parts`: those of the last step's loss, by
    name, once there is more than one, or a cache.
    """

    source: str  # of the teacher
    objective: Objective  # whose vocabulary is the student's own, and known once that is there
    build: Build
    inputs: Inputs
    precision: str = "bf16"
    offload: bool = False
    cache: str = ""
    aux: float = 0.0
    pairs: str = ""
    measure: str = "cosine"
    weight: float | None = None
    plan: PrunePlan | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.teacher: Teacher | None = None
        self._cached: Any = None
        self._intermediate: Intermediate | None = None
        self._meter: Meter | None = None
        self._state: dict[str, Any] | None = None

    def prepare(self, config: Any) -> None:
        """Sets the student's live config, before Megatron's DDP reads it."""
        # Else a rank with few tokens would weigh as much as one with many.
        config.calculate_per_token_loss = True
        set_routers_loss(config, self.aux)

    def begin(self, student: list[Any]) -> None:
        """Opens what the filled student learns from. Raises InputError for another vocabulary, and a layout that the
        teacher cannot run in."""
        self.objective = dataclasses.replace(self.objective, vocab_size=architecture_of(student[0]).vocab_size)
        if self.cache:
            self._learn_from_cache()
        elif self.objective.logits_weight or self.pairs:
            self.teacher = self._load(student[0].config.sequence_parallel)
        if self.pairs or self.cache or self.aux or len(self.objective.parts) > 1:
            self._watch(student)

    @property
    def forward(self) -> Callable[[Any, Any], Tensor]:
        """The forward step: (model, micro-batch) -> the loss per token, or an earlier stage's states."""
        return distillation_step(self.objective, self.inputs, self.teacher, self._meter)

    def data_step(self, original: DataStep) -> DataStep:
        """The loop's data step, looked at where the loss needs a micro-batch as a whole."""
        if self._cached is not None:
            from nemo_minitron.distillation.cache.objective import with_targets

            return with_targets(original, self._cached)
        return original if self._intermediate is None else _shown(original, self._intermediate.expect)

    def _learn_from_cache(self) -> None:
        from nemo_minitron.distillation.cache import CachedTeacher
        from nemo_minitron.distillation.cache.objective import CachedObjective

        self._cached, given = CachedTeacher(self.cache), self.objective
        self._cached.cache.header.check(self.cache, vocab_size=given.vocab_size)
        fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
        self.objective = CachedObjective(**fields, cached=self._cached)

    def _load(self, sp: bool) -> Teacher:
        source = open_source(self.source)
        ours, theirs = self.objective.vocab_size, source.architecture.vocab_size
        if ours != theirs:
            raise InputError(f"the student has {ours} tokens in its vocabulary, the teacher {theirs}; they must agree")
        layout = current_layout(sp=sp).for_depth(source.architecture.num_layers)
        chunks = load(source, build=self.build, precision=self.precision, layout=layout)
        return Teacher(chunks, self.inputs, offload=self.offload)

    def _watch(self, student: list[Any]) -> None:
        """The parts of the loss apart, and those of intermediate states."""
        ours, kept = architecture_of(student[0]), self.plan.keep if self.plan else {}
        pairs: tuple[Any, ...] = ()
        if self.pairs and self.teacher:
            theirs = self.teacher.chunks[0].config
            pairs = layer_map(self.pairs, ours.num_layers, theirs.num_layers, kept.get("layers"))
        self._meter = Meter([*self.objective.parts, *map(str, pairs)])
        if pairs and self.teacher:
            widths = ours.hidden_size, theirs.hidden_size
            projection = None if len(set(widths)) == 1 else Projection(*widths, self.seed, kept.get("hidden"))
            self._intermediate = Intermediate(
                pairs, student, self.teacher, measure=self.measure, weight=self.weight, projection=projection,
                meter=self._meter,
            )  # fmt: skip
            if self._state is not None:
                self._intermediate.load(self._state)

    @property
    def names(self) -> list[str]:
        """The columns that `parts` has."""
        extra = ["alpha"] * (self._intermediate is not None) + [ROUTERS] * bool(self.aux)
        return [*self._meter.parts, *extra] if self._meter else []

    def before_step(
        self, count: int, micro_batch_size: int, replay: Callable[[], tuple[Any, int]], data_step: DataStep
    ) -> None:
        """Before the student's schedule of `count` micro-batches: the teacher's, over the same ones.

        `replay()`: those micro-batches once more, and their sequence length; `data_step`: the student's.
        """
        if self.teacher is None:
            return
        self.teacher.come()
        if self.teacher.staged:
            batches, length = replay()
            self.teacher.ahead(batches, data_step, count, length, micro_batch_size)
            if self._intermediate is not None:
                self._intermediate.send(count, length, micro_batch_size)

    def after_step(self, count: int, learning_rate: float) -> None:
        """After the student's schedule: the parts of its loss, and the step of what is learned beside it."""
        if self.teacher is not None:
            self.teacher.leave()
        if self._meter is not None:
            self.parts = self._meter.reduce()
        if self.aux:
            self.parts[ROUTERS] = routers_loss(count)
        if self._intermediate is not None:
            self.parts["alpha"] = self._intermediate.alpha  # of this step
            self._intermediate.finish(self.parts, learning_rate)

    def end(self) -> None:
        """After the last step: the student's hooks go, since a student that is used further has no teacher's states."""
        if self._intermediate is not None:
            self._intermediate.remove()

    @property
    def state(self) -> dict[str, Any] | None:
        """What a checkpoint must hold beside the student; None for nothing."""
        return None if self._intermediate is None else self._intermediate.state()

    def load(self, state: dict[str, Any] | None) -> None:
        """The state of a checkpoint, before `begin` or after it."""
        self._state = state
        if state is not None and self._intermediate is not None:
            self._intermediate.load(state)


def _shown(data_step: DataStep, see: Callable[[Any], None]) -> DataStep:
    """A data step that shows each micro-batch as a whole before it is cut for this stage."""

    def step(batches: Any) -> Any:
        item = next(batches)
        see(item[0] if isinstance(item, tuple) else item)
        return data_step(iter([item]))

    return step
