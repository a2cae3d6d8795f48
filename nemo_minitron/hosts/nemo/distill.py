"""Distillation in NeMo's trainer: a frozen teacher runs beside the student, which learns from its outputs."""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_minitron.backend.masks import given_mask
from nemo_minitron.errors import InputError
from nemo_minitron.hosts.distillation import make_distiller
from nemo_minitron.hosts.nemo.models import build_model
from nemo_minitron.hosts.nemo.trainer import chunks_of, leave_context, share_config
from nemo_minitron.megatron.live import fill
from nemo_minitron.megatron.random_start import RandomStart
from nemo_minitron.sources.tensors import ModelSource

STATE = "minitron_distillation"  # the key in a checkpoint's common state, where NeMo has its own keys


class FillStudent(Callback):
    """Fills the model with the weights of `source` when a fit or a validation starts. A fit that resumes from a
    checkpoint keeps the checkpoint's weights.

    `random`: a seed; a fit then starts with random weights instead, the same in every layout. Raises InputError as
    `megatron.live.fill`.
    """

    def __init__(self, source: ModelSource, random: int | None = None) -> None:
        self.source, self.random = source, random

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)
        share_config(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.ckpt_path is None:
            random = None if self.random is None else RandomStart(self.source.architecture, self.random)
            fill(chunks_of(trainer), random or self.source)
            for optimizer in trainer.optimizers:
                optimizer.mcore_optimizer.reload_model_params()  # the fp32 master copies

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            fill(chunks_of(trainer), self.source)


class Distillation(Callback):
    """Makes `trainer.fit` learn from a teacher's outputs (2407.14679, section 3).

    The teacher: `teacher` is a Hugging Face folder, a hub id or a NeMo checkpoint. It is loaded in the student's
    layout; the pipeline's stages divide its own number of layers. It is frozen and in eval mode, and has no gradients,
    optimizer state or gradient buffers. It is not in the student's module tree, so no checkpoint contains it.
    `precision` is the teacher's. `offload` keeps its layers on the CPU between steps.

    The loss: logits_weight * `loss` + lm_weight * the language-model loss. `loss` is a name in `distillation.losses`;
    `top_k` belongs to `top_k_kl`. The loss is the mean over the tokens of the global batch (Megatron's
    `calculate_per_token_loss`), so the samples' masks may differ in length. With logits_weight 0 it is the
    language-model loss alone; without `intermediate`, no teacher is loaded then.

    States between layers: `intermediate` is "auto" or pairs of states (`distillation.layer_map`). They are compared by
    `intermediate_loss`, after a learned linear if their widths differ; `seed` is the seed of its start.
    `intermediate_weight` None is the paper's dynamic alpha (`distillation.intermediate`). `plan` is the file of the
    PrunePlan that made the student; "auto" and the start of the linear need it.

    A cache: `cache` is a folder of `minitron cache-logits`. No teacher is loaded then, and the loss is the one that the
    cache was made for, at its temperature. The training must use the cache's rows (`megatron.rows`), in any order.

    Mixtures: `moe_aux_loss_coeff` is the coefficient of the routers' load-balancing loss (`distillation.routers`). It
    replaces what the model's config says while the student is distilled, so that the loss is what was asked for. The
    routers' z-loss is off.

    Vocabularies: the two are one, unless `common_vocabulary` says how many tokens both begin with. The losses of the
    logits then compare these, as if there were no others.

    `parts` has the parts of the last step's loss by name, if there is more than one part or a cache. NeMo's logger gets
    them too.

    Raises InputError for an unknown name, a number out of its range, a routers' loss of a model without routers, a
    teacher with another vocabulary, a layout in which the teacher cannot run, and for `average_in_collective`.
    """

    def __init__(
        self, teacher: str, loss: str = "forward_kl", temperature: float = 1.0, precision: str = "bf16",
        offload: bool = False, *, top_k: int = 100, logits_weight: float = 1.0, lm_weight: float = 0.0,
        intermediate: str = "", intermediate_loss: str = "cosine", intermediate_weight: float | None = None,
        plan: str | None = None, seed: int = 1234, cache: str = "", moe_aux_loss_coeff: float = 0.0,
        common_vocabulary: int | None = None,
    ) -> None:  # fmt: skip
        self.distiller = make_distiller(
            build_model, model_inputs, teacher=teacher, loss=loss, temperature=temperature, precision=precision,
            offload=offload, top_k=top_k, logits_weight=logits_weight, lm_weight=lm_weight, intermediate=intermediate,
            intermediate_loss=intermediate_loss, intermediate_weight=intermediate_weight, plan=plan, seed=seed,
            cache=cache, moe_aux_loss_coeff=moe_aux_loss_coeff, common_vocabulary=common_vocabulary,
        )  # fmt: skip

    @property
    def parts(self) -> dict[str, float]:
        return self.distiller.parts

    @property
    def names(self) -> list[str]:
        """The keys of `parts`, in the order in which a log shows them."""
        return self.distiller.names

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)
        share_config(pl_module)
        if getattr(trainer.strategy.ddp_config, "average_in_collective", False):
            raise InputError("average_in_collective is on; masked tokens need a sum over ranks, set it to False")
        self.distiller.prepare(pl_module.config)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.distiller.begin(chunks_of(trainer))
        # NeMo has recorded the config's arguments by now, so a checkpoint's context has NeMo's own functions.
        config = pl_module.config
        config.forward_step_fn = self.distiller.forward
        config.data_step_fn = self.distiller.data_step(config.data_step_fn)

    def on_megatron_microbatches_start(self, step: Any) -> None:
        if not step.forward_only:
            data_step = step.pl_module.data_step
            self.distiller.before_step(step.num_microbatches, step.micro_batch_size, lambda: replay(step), data_step)

    def on_megatron_microbatches_end(self, step: Any) -> None:
        if not step.forward_only:
            rate = step.trainer.optimizers[0].param_groups[0]["lr"]
            self.distiller.after_step(step.num_microbatches, rate)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.log_dict({f"distillation/{name}": self.parts[name] for name in self.names}, batch_size=1)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.distiller.end()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        state = self.distiller.state
        if state is not None:
            checkpoint[STATE] = state

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.distiller.load(checkpoint.get(STATE))


def replay(step: Any) -> tuple[Any, int]:
    """A second copy of the micro-batches of NeMo's MegatronStep, as it gives them to Megatron's schedule, and their
    sequence length.

    The step has not read its micro-batches yet. They are read here, and the step then gets the same ones.
    """
    items = [next(step.data) for _ in range(1 if step.has_global_batch_sampler else step.num_microbatches)]
    step.data = iter(items)
    again = dataclasses.replace(step, data=iter(items))
    batches, length = again.get_data_iterator_and_seq_length()
    return batches, length or step.seq_length


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments with which NeMo's forward step calls a model for such a batch, without the labels."""
    arguments = {"input_ids": batch["tokens"], "position_ids": batch["position_ids"]}
    arguments["attention_mask"] = given_mask(batch.get("attention_mask"))
    if "cu_seqlens" in batch:
        from nemo.collections.llm.gpt.model.base import get_packed_seq_params

        arguments["packed_seq_params"] = get_packed_seq_params(batch)
    return arguments
