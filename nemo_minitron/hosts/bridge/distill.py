"""Distillation in Bridge's training loop: a frozen teacher runs beside the student, which learns from its outputs.

Shapes (docs/shapes.md): S positions of the sequence, B sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.losses import masked_next_token_loss
from megatron.bridge.training.utils.flop_utils import accumulate_flops_metadata
from megatron.bridge.training.utils.packed_seq_utils import get_packed_seq_params

from nemo_minitron.artifacts.files import atomic_file
from nemo_minitron.backend.differences import batch_on_this_cp_rank
from nemo_minitron.backend.masks import given_mask
from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.distillation.teacher import DataStep
from nemo_minitron.errors import InputError
from nemo_minitron.hosts.bridge.models import build_model
from nemo_minitron.hosts.bridge.schedule import Step, around_steps
from nemo_minitron.hosts.distillation import make_distiller
from nemo_minitron.sources.bridge_config import name_of

PACKED = ("cu_seqlens", "max_seqlen", "total_tokens")  # how the names of a packed row's numbers begin
TENSORS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


class Distillation(Callback):
    """Makes Bridge's `pretrain` learn from a teacher's outputs (2407.14679, section 3):

        distillation = Distillation(config, "teacher", loss="forward_kl")
        pretrain(config, distillation.forward_step, callbacks=[distillation])

    `config`: Bridge's ConfigContainer, with the student as its model. The loss is the mean over the tokens of the
    global batch (Megatron's `calculate_per_token_loss`), which is set on the model here. A config serves one training.

    The other options are those of `hosts.nemo.distill.Distillation`: the teacher, the losses, states between layers, a
    cache, the routers' loss. The linear between states is saved beside each checkpoint, in a file of its own that only
    this callback reads.

    `parts` has the parts of the last step's loss by name, if there is more than one part or a cache. TensorBoard gets
    them too.

    Raises InputError for an unknown name, a number out of its range, a routers' loss of a model without routers, a
    teacher with another vocabulary, a layout in which the teacher cannot run, and for `average_in_collective`.
    """

    def __init__(
        self, config: Any, teacher: str, loss: str = "forward_kl", temperature: float = 1.0, precision: str = "bf16",
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
        self.distiller.prepare(config.model)
        config.model.register_pre_wrap_hook(functools.partial(_check_sum, config))
        self._data_step: DataStep = micro_batch
        self._forward: Callable[[Any, Any], torch.Tensor] | None = None
        self._optimizer: Any = None
        self._remove = around_steps(self._before_step, self._after_step)

    @property
    def parts(self) -> dict[str, float]:
        return self.distiller.parts

    @property
    def names(self) -> list[str]:
        """The keys of `parts`, in the order in which a log shows them."""
        return self.distiller.names

    def forward_step(self, state: Any, data_iterator: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
        """Bridge's forward step, with the distillation's loss in the place of cross entropy."""
        chunk = unwrap(model)
        batch = self._data_step(data_iterator)
        length = getattr(chunk.config, "seq_length", None)
        accumulate_flops_metadata(state, batch["tokens"], vp_stage=chunk.vp_stage, config_seq_len=length)
        assert self._forward is not None
        loss_BS = self._forward(model, batch)
        # Numbers that are not finite end the training elsewhere, on all ranks.
        reduce = functools.partial(
            masked_next_token_loss, batch["loss_mask"], check_for_nan_in_loss=False, check_for_spiky_loss=False
        )
        return loss_BS, reduce

    def on_train_start(self, context: Any) -> None:
        self._optimizer = context.optimizer
        step = context.state.train_state.step
        if step:
            self.distiller.load(_saved_state(context.state.cfg.checkpoint.load, step))
        self.distiller.begin([unwrap(chunk) for chunk in context.model])
        self._data_step = self.distiller.data_step(micro_batch)
        self._forward = self.distiller.forward

    def _before_step(self, step: Step) -> None:
        self.distiller.before_step(step.count, step.micro_batch_size, step.replay, self._data_step)

    def _after_step(self, step: Step, losses: list[Any]) -> None:
        self.distiller.after_step(step.count, self._optimizer.param_groups[0]["lr"])

    def on_train_step_end(self, context: Any) -> None:
        writer = context.state.tensorboard_logger
        for name in self.names if writer else ():
            writer.add_scalar(f"distillation/{name}", self.parts[name], context.state.train_state.step + 1)

    def on_train_end(self, context: Any) -> None:
        self.close()

    def close(self) -> None:
        """Removes the hooks of this training. Bridge's loop does not say so when it is told to stop."""
        self._remove()
        self.distiller.end()

    def on_checkpoint_save(self, context: Any) -> None:
        self.save_state(context.state.cfg.checkpoint.save, context.state.train_state.step)

    def save_state(self, folder: str, step: int) -> None:
        """Writes what a training that resumes at `step` needs beside its checkpoint in `folder`. Rank 0 writes, and
        removes the files of steps whose checkpoints are gone."""
        state = self.distiller.state
        if state is None or torch.distributed.get_rank():
            return
        with atomic_file(state_file(folder, step)) as file:
            torch.save(dict(state), file)
        for old in Path(folder).glob("distillation_*.pt"):
            saved = name_of(int(old.stem.removeprefix("distillation_")))
            if saved != name_of(step) and not (Path(folder) / saved).is_dir():
                old.unlink()


def state_file(folder: str | Path, step: int) -> Path:
    """The file of the loss between states (its linear, its weight), for the checkpoint after so many steps."""
    # Bridge takes every name that begins with iter_ for a checkpoint.
    return Path(folder) / f"distillation_{step:07d}.pt"


def _saved_state(folder: str, step: int) -> Any:
    """What `save_state` has written for a step; None if it has written nothing."""
    file = state_file(folder, step)
    return torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else None


def _check_sum(config: Any, chunks: list[Any]) -> list[Any]:
    """Runs after the model is built and before it is wrapped, when the config is final."""
    if config.ddp.average_in_collective:
        raise InputError("average_in_collective is on; masked tokens need a sum over ranks, set it to False")
    return chunks


def micro_batch(batches: Iterator[Any]) -> dict[str, Any]:
    """The next micro-batch, on this rank's device and cut for its part of the sequence: every stage gets all tensors.

    Raises InputError for packed rows (`cu_seqlens`) that context parallelism would cut.
    """
    item = next(batches)
    device = torch.cuda.current_device()
    found = {name: item[name].to(device) for name in TENSORS if item.get(name) is not None}
    packed = {name: value for name, value in item.items() if name.startswith(PACKED) and value is not None}
    for name in [name for name in packed if name.startswith("cu_seqlens") and not name.endswith("argmin")]:
        packed[name] = packed[name].to(device)  # the other numbers are read on the CPU
    batch: dict[str, Any] = batch_on_this_cp_rank(found)
    if packed:
        if batch["tokens"].shape != found["tokens"].shape:
            raise InputError("the rows are packed (cu_seqlens); distillation needs context_parallel_size=1 for them")
        batch["packed"] = packed
    return batch


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a model's forward pass for a micro-batch, without the labels. Without `total_tokens` the
    states of a Mamba layer would run from a packed row's sample into the next one."""
    arguments = {"input_ids": batch["tokens"], "position_ids": batch["position_ids"]}
    arguments["attention_mask"] = given_mask(batch.get("attention_mask"))
    if "packed" in batch:
        whole_row = {"total_tokens": batch["tokens"].shape[1]}
        arguments["packed_seq_params"] = get_packed_seq_params(whole_row | batch["packed"])
    return arguments
