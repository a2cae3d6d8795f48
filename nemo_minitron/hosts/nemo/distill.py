"""Distillation under NeMo's trainer: the frozen teacher beside the student, its outputs as the target."""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.distillation import losses
from nemo_minitron.distillation.intermediate import MEASURES, Intermediate
from nemo_minitron.distillation.layer_map import layer_map
from nemo_minitron.distillation.meter import Meter
from nemo_minitron.distillation.projection import Projection
from nemo_minitron.distillation.routers import ROUTERS, routers_loss, set_routers_loss
from nemo_minitron.distillation.step import Objective, distillation_step
from nemo_minitron.distillation.teacher import Teacher
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.hosts.nemo.models import current_layout, load_model
from nemo_minitron.hosts.nemo.trainer import chunks_of, leave_context, share_config
from nemo_minitron.importance.forward import architecture_of
from nemo_minitron.megatron.live import fill
from nemo_minitron.megatron.random_start import RandomStart
from nemo_minitron.schema import SEEDS
from nemo_minitron.settings.validated import check_number, check_whole
from nemo_minitron.sources.open import open_source

STATE = "minitron_distillation"  # in a checkpoint's common state, beside what NeMo puts there


class FillStudent(Callback):
    """Fills the model of a fresh fit by reading `source`; a fit that resumes keeps its own weights.

    `random`: a seed; the model starts with random weights instead, the same in every layout.
    """

    def __init__(self, source: str, random: int | None = None) -> None:
        self.source, self.random = source, random

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)
        share_config(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.ckpt_path is None:
            source = open_source(self.source)
            fill(chunks_of(trainer), source if self.random is None else RandomStart(source.architecture, self.random))
            for optimizer in trainer.optimizers:
                optimizer.mcore_optimizer.reload_model_params()  # the fp32 master copies

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            fill(chunks_of(trainer), open_source(self.source))


class Distillation(Callback):
    """On `trainer.fit`: the loss becomes one against the teacher's outputs (2407.14679, section 3).

    `teacher`: a Hugging Face folder, a hub id or a NeMo checkpoint, loaded by reading in the student's
    layout, its layers divided over the pipeline by their own number: frozen, in eval mode, without gradients,
    optimizer state or gradient buffers, and outside the student's module tree, so that no checkpoint sees it.
    `precision` is the teacher's; `offload` keeps its layers on the CPU between steps.

    The loss is logits_weight * `loss` (a name in `distillation.losses`; `top_k` is that of `top_k_kl`) +
    lm_weight * the language-model loss, the mean over the tokens of the global batch (Megatron's
    `calculate_per_token_loss`), so that masks may be of any length. With logits_weight 0 it is the LM loss alone,
    and without `intermediate` no teacher is loaded. `intermediate`: "auto" or pairs of states
    (`distillation.layer_map`), compared by `intermediate_loss` after one learned linear where widths differ;
    `intermediate_weight` None is the paper's dynamic alpha (`distillation.intermediate`). `plan`: where the student
    comes from, a PrunePlan's file, which "auto" and the linear's start need.
    `cache`: a folder of `minitron cache-logits`; then no teacher is loaded, and the loss is the cache's own, at its
    temperature. Training's rows must be the cache's (`nemo.data.rows`), in any order.
    `moe_aux_loss_coeff`: of the load-balancing loss of a mixture's routers, in the place of what the model's config
    has, for as long as it is distilled: a loss is what it says it is (`distillation.routers`). Its z-loss is off.
    `parts` are the parts of the last step's loss, by name, once there is more than one, or a cache; NeMo's logger
    has them too.

    Raises InputError for names that are unknown, numbers that are none, a routers' loss without routers, another
    vocabulary, a layout that the teacher cannot run in, or gradients that are averaged in the collective.
    """

    def __init__(
        self, teacher: str, loss: str = "forward_kl", temperature: float = 1.0, precision: str = "bf16",
        offload: bool = False, *, top_k: int = 100, logits_weight: float = 1.0, lm_weight: float = 0.0,
        intermediate: str = "", intermediate_loss: str = "cosine", intermediate_weight: float | None = None,
        plan: str | None = None, seed: int = 1234, cache: str = "", moe_aux_loss_coeff: float = 0.0,
    ) -> None:  # fmt: skip
        for name, value, legal in (("loss", loss, losses.__all__), ("intermediate_loss", intermediate_loss, MEASURES)):
            if value not in legal:
                raise InputError(f"{name} '{value}' is unknown; {nearest(value, legal)}")
        for name, number in (
            ("temperature", temperature), ("logits_weight", logits_weight), ("lm_weight", lm_weight),
            ("intermediate_weight", intermediate_weight or 0.0), ("moe_aux_loss_coeff", moe_aux_loss_coeff),
        ):  # fmt: skip
            check_number(name, number, above_zero=name == "temperature")
        check_whole("top_k", top_k)
        check_whole("seed", seed, least=0, most=SEEDS)
        if not (logits_weight or lm_weight):
            raise InputError("logits_weight and lm_weight are both 0; at least one must be above")
        self.source, self.precision, self.offload, self.seed = teacher, precision, offload, seed
        # The vocabulary is the student's own, and known once it is there.
        self.objective = Objective(0, loss, temperature, top_k, logits_weight, lm_weight)
        self.cache, self.aux = cache, moe_aux_loss_coeff
        self.pairs, self.measure, self.weight = intermediate, intermediate_loss, intermediate_weight
        self.plan = PrunePlan.load(plan) if plan else None
        self.parts: dict[str, float] = {}
        self.teacher: Teacher | None = None
        self._intermediate: Intermediate | None = None
        self._meter: Meter | None = None
        self._state: dict[str, Any] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)
        share_config(pl_module)
        if getattr(trainer.strategy.ddp_config, "average_in_collective", False):
            raise InputError("average_in_collective is on; masked tokens need a sum over ranks, set it to False")
        # Before Megatron's DDP reads it. Else a rank with few tokens would weigh as much as one with many.
        pl_module.config.calculate_per_token_loss = True
        set_routers_loss(pl_module.config, self.aux)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        student = chunks_of(trainer)
        self.objective = dataclasses.replace(self.objective, vocab_size=architecture_of(student[0]).vocab_size)
        if self.cache:
            self._learn_from_cache(pl_module.config)
        elif self.objective.logits_weight or self.pairs:
            self.teacher = self._load(student[0].config.sequence_parallel)
        if self.pairs or self.cache or self.aux or len(self.objective.parts) > 1:
            self._watch(student)
        # Set on the live config, after NeMo recorded its arguments: a checkpoint's context has NeMo's own.
        pl_module.config.forward_step_fn = distillation_step(self.objective, model_inputs, self.teacher, self._meter)
        if self._intermediate is not None:
            pl_module.config.data_step_fn = shown(pl_module.config.data_step_fn, self._intermediate.expect)

    def _learn_from_cache(self, config: Any) -> None:
        from nemo_minitron.distillation.cache import CachedTeacher
        from nemo_minitron.distillation.cache.objective import CachedObjective, with_targets

        cached, given = CachedTeacher(self.cache), self.objective
        cached.cache.header.check(self.cache, vocab_size=given.vocab_size)
        fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
        self.objective = CachedObjective(**fields, cached=cached)
        config.data_step_fn = with_targets(config.data_step_fn, cached)

    def _load(self, sp: bool) -> Teacher:
        source = open_source(self.source)
        ours, theirs = self.objective.vocab_size, source.architecture.vocab_size
        if ours != theirs:
            raise InputError(f"the student has {ours} tokens in its vocabulary, the teacher {theirs}; they must agree")
        layout = current_layout(sp=sp).for_depth(source.architecture.num_layers)
        return Teacher(
            load_model(self.source, precision=self.precision, layout=layout), model_inputs, offload=self.offload
        )

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

    def on_megatron_microbatches_start(self, step: Any) -> None:
        """Before the student's schedule: the teacher's, over the same micro-batches."""
        if step.forward_only or self.teacher is None:
            return
        self.teacher.come()
        if self.teacher.staged:
            batches, length = replay(step)
            data_step = step.pl_module.data_step
            self.teacher.ahead(batches, data_step, step.num_microbatches, length, step.micro_batch_size)
            if self._intermediate is not None:
                self._intermediate.send(step.num_microbatches, length, step.micro_batch_size)

    def on_megatron_microbatches_end(self, step: Any) -> None:
        if step.forward_only:
            return
        if self.teacher is not None:
            self.teacher.leave()
        if self._meter is not None:
            self.parts = self._meter.reduce()
        if self.aux:
            self.parts[ROUTERS] = routers_loss(step.num_microbatches)
        if self._intermediate is not None:
            self.parts["alpha"] = self._intermediate.alpha  # of this step
            rate = step.trainer.optimizers[0].param_groups[0]["lr"]
            self._intermediate.finish(self.parts, rate)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.log_dict({f"distillation/{name}": self.parts[name] for name in self.names}, batch_size=1)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._intermediate is not None:
            checkpoint[STATE] = self._intermediate.state()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._state = checkpoint.get(STATE)
        if self._state is not None and self._intermediate is not None:
            self._intermediate.load(self._state)


def shown(data_step: Any, see: Any) -> Any:
    """NeMo's data step, which shows each micro-batch as a whole before it is cut for this stage."""

    def step(batches: Any) -> Any:
        item = next(batches)
        see(item[0] if isinstance(item, tuple) else item)
        return data_step(iter([item]))

    return step


def replay(step: Any) -> tuple[Any, int]:
    """The micro-batches of NeMo's MegatronStep, once more, as it gives them to Megatron's schedule, and their length.

    They are drawn here, ahead of the step, which then finds the same ones.
    """
    items = [next(step.data) for _ in range(1 if step.has_global_batch_sampler else step.num_microbatches)]
    step.data = iter(items)
    again = dataclasses.replace(step, data=iter(items))
    batches, length = again.get_data_iterator_and_seq_length()
    return batches, length or step.seq_length


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What NeMo's forward step gives a model of such a batch, but for the labels."""
    given = {"input_ids": batch["tokens"], "position_ids": batch["position_ids"]}
    given["attention_mask"] = batch.get("attention_mask")
    if "cu_seqlens" in batch:
        from nemo.collections.llm.gpt.model.base import get_packed_seq_params

        given["packed_seq_params"] = get_packed_seq_params(batch)
    return given
