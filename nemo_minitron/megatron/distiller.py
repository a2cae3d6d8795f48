"""A distillation for any training loop of Megatron models. The host calls these hooks from its own loop:

1. `prepare`, before the student is built.
2. `load`, with the state of the checkpoint from which a training resumes.
3. `begin`, once the student is filled. Then `forward` and `data_step` replace the loop's own forward and data step.
4. `before_step` and `after_step`, around each step's schedule of micro-batches. A validation needs neither.
5. `end`, after the last step.

`state` goes into the host's checkpoints. All hooks are called on every rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from nemo_minitron import hybrid
from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.backend.optimizer import save_whole
from nemo_minitron.distillation.intermediate import Intermediate
from nemo_minitron.distillation.layer_map import Pair, layer_map
from nemo_minitron.distillation.meter import Meter
from nemo_minitron.distillation.projection import Projection
from nemo_minitron.distillation.routers import ROUTERS, routers_loss, set_routers_loss
from nemo_minitron.distillation.step import Objective, distillation_step
from nemo_minitron.distillation.teacher import Batch, Batches, DataStep, Inputs, Teacher
from nemo_minitron.errors import InputError
from nemo_minitron.importance.forward import architecture_of
from nemo_minitron.megatron.groups import current_layout
from nemo_minitron.megatron.load import Build, load
from nemo_minitron.sources.open import open_source

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    from nemo_minitron.distillation.cache import CachedTeacher
    from nemo_minitron.importance.batches import Batch


@dataclasses.dataclass
class Distiller:
    """What the student learns from, and how: those values of `settings.Distillation` that do not concern the host.

    `parts`: the parts of the last step's loss by name, means over the tokens of the global batch, the same on every
    rank. It is empty if the loss has one part and nothing else is measured.
    """

    source: str  # the teacher: a Hugging Face folder, a hub id or a checkpoint; unused with a cache
    objective: Objective  # `begin` sets its vocabulary to the student's
    build: Build  # the host's; it builds the teacher
    inputs: Inputs  # a micro-batch -> the keyword arguments of a model's forward, without the labels
    precision: str = "bf16"  # the teacher's
    offload: bool = False  # the teacher's layers lie on the CPU between steps
    cache: str = ""  # a folder of cached logits, which replaces the teacher
    aux: float = 0.0  # coefficient of the routers' load-balancing loss
    pairs: str = ""  # pairs of states between layers, "auto", or nothing
    measure: str = "cosine"  # how the states are compared
    weight: float | None = None  # the weight of their loss; None is the paper's dynamic one
    plan: PrunePlan | None = None  # the plan that made the student
    seed: int = 1234  # of the linear between states of unlike widths
    common: int | None = None  # the tokens that both vocabularies begin with; None: they are one

    def __post_init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.teacher: Teacher | None = None
        self._cached: CachedTeacher | None = None
        self._intermediate: Intermediate | None = None
        self._meter: Meter | None = None
        self._state: Mapping[str, object] | None = None
        self._resumes = False

    def prepare(self, config: TransformerConfig) -> None:
        """Sets the student's live config (Megatron's TransformerConfig). It must run before Megatron's DDP reads the
        config. Raises InputError for a routers' loss of a model without routers."""
        save_whole()
        # Without it, a rank with few tokens would have the weight of a rank with many.
        config.calculate_per_token_loss = True
        set_routers_loss(config, self.aux)

    def begin(self, student: list[MegatronModule]) -> None:
        """Loads the teacher or opens the cache. `student`: this rank's chunks, filled. Collective.

        Raises InputError if teacher and student differ in their vocabulary, if the teacher cannot run in the student's
        layout, if one of them is a hybrid, or if the teacher or the cache cannot be read.
        """
        architecture = architecture_of(student[0])
        hybrid.check_stage(architecture.hybrid_pattern, "distill")
        self.objective = dataclasses.replace(self.objective, vocab_size=architecture.vocab_size)
        if self.cache:
            self._learn_from_cache()
        elif self.objective.logits_weight or self.pairs:
            self.teacher = self._load(student[0].config.sequence_parallel)
        if self.pairs or self.cache or self.aux or len(self.objective.parts) > 1:
            self._watch(student)

    @property
    def forward(self) -> Callable[[MegatronModule, Batch], Tensor]:
        """The forward step: (model, micro-batch) -> the loss of each token [B, S] of this rank; on an earlier pipeline
        stage, the states that it sends on."""
        return distillation_step(self.objective, self.inputs, self.teacher, self._meter)

    def data_step(self, original: DataStep) -> DataStep:
        """The loop's data step. It is wrapped if the loss needs a micro-batch before it is cut for this rank."""
        if self._cached is not None:
            from nemo_minitron.distillation.cache.objective import with_targets

            return with_targets(original, self._cached)
        return original if self._intermediate is None else _shown(original, self._intermediate.expect)

    def _learn_from_cache(self) -> None:
        from nemo_minitron.distillation.cache import CachedTeacher
        from nemo_minitron.distillation.cache.objective import CachedObjective

        self._cached, objective = CachedTeacher(self.cache), self.objective
        self._cached.cache.header.check(self.cache, vocab_size=objective.vocab_size)
        fields = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
        self.objective = CachedObjective(**fields, cached=self._cached)

    def _load(self, sp: bool) -> Teacher:
        """The teacher in the student's layout. `sp`: whether the student runs sequence parallelism."""
        source = open_source(self.source)
        hybrid.check_stage(source.architecture.hybrid_pattern, "distill")
        ours, theirs = self.objective.vocab_size, source.architecture.vocab_size
        if self.common is None and ours != theirs:
            raise InputError(
                f"the student has {ours} tokens in its vocabulary, the teacher {theirs}; they must agree, or "
                "common_vocabulary must say how many both begin with"
            )
        if self.common is not None and self.common > min(ours, theirs):
            raise InputError(
                f"common_vocabulary is {self.common}; the student has {ours} tokens in its vocabulary and the teacher "
                f"{theirs}: legal are 1 to {min(ours, theirs)}"
            )
        self.objective = dataclasses.replace(self.objective, common=self.common)
        # The teacher has another number of layers, which the pipeline's stages must divide in their own way.
        layout = current_layout(sp=sp).for_depth(source.architecture.num_layers)
        chunks = load(source, build=self.build, precision=self.precision, layout=layout)
        return Teacher(chunks, self.inputs, offload=self.offload)

    def _watch(self, student: list[MegatronModule]) -> None:
        """Prepares the meter of the loss's parts and the loss of intermediate states."""
        ours, kept = architecture_of(student[0]), self.plan.keep if self.plan else {}
        pairs: tuple[Pair, ...] = ()
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
            if self._resumes:
                self._take_state()

    @property
    def names(self) -> list[str]:
        """The keys of `parts`, in the order in which a log shows them."""
        extra = ["alpha"] * (self._intermediate is not None) + [ROUTERS] * bool(self.aux)
        return [*self._meter.parts, *extra] if self._meter else []

    def before_step(
        self, count: int, micro_batch_size: int, replay: Callable[[], tuple[Batches, int]], data_step: DataStep
    ) -> None:
        """Runs before the student's schedule of `count` micro-batches. A teacher in pipeline stages runs its whole
        schedule now, over the same micro-batches; any other teacher runs inside of the student's forward step.

        `replay()` returns an iterator of those micro-batches and their sequence length; the student must still get
        them afterwards. `data_step`: the student's.
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
        """Runs after the student's schedule: it sums up the parts of the loss over the ranks and takes the optimizer
        step of the linear between intermediate states. `learning_rate`: the one of this step. Collective."""
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
        """Runs after the last step. It removes the hooks from the student: if the student is used further, there are no
        states of a teacher to compare its own with."""
        if self._intermediate is not None:
            self._intermediate.remove()

    @property
    def state(self) -> Mapping[str, object] | None:
        """What a checkpoint must hold in addition to the student: a nested dict of tensors and numbers, or None."""
        return None if self._intermediate is None else self._intermediate.state()

    def load(self, state: Mapping[str, object] | None) -> None:
        """Takes `state` from a checkpoint, before `begin` or after it; None: the checkpoint has none.

        Raises InputError, here or in `begin`, if there is none and the loss compares states between layers."""
        self._state, self._resumes = state, True
        if self._intermediate is not None:
            self._take_state()

    def _take_state(self) -> None:
        assert self._intermediate is not None
        if self._state is None:
            raise InputError(
                "the checkpoint from which this training resumes has nothing of the loss between states (its linear, "
                "its weight); resume from one that has it, or train without intermediate states"
            )
        self._intermediate.load(self._state)


def _shown(data_step: DataStep, see: Callable[[Batch], None]) -> DataStep:
    """A data step that shows each micro-batch as a whole before it is cut for this stage."""

    def step(batches: Iterator[Batch]) -> Batch:
        item = next(batches)
        see(item[0] if isinstance(item, tuple) else item)
        return data_step(iter([item]))

    return step
