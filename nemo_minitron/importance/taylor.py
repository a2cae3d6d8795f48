"""Taylor scores: |activation x gradient|, what the loss changes by, to first order, where the activation is cut.

The alternative that 2407.14679 (section 2.2) leaves out for its cost: a backward pass for each batch. The loss is
the sum of the losses of the next tokens, of all tokens that count, so that no layout and no number of samples
scales a score; the products go through the same aggregations as activations do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.errors import InputError
from nemo_minitron.importance.batches import Batch, forward_arguments


@contextlib.contextmanager
def differentiable(chunks: Sequence[Any]) -> Iterator[None]:
    """Models whose activations have gradients and whose parameters have none; afterwards each is as it was.

    Raises InputError for virtual pipeline stages.
    """
    if len(chunks) > 1:
        raise InputError(
            f"Taylor scores under vp={len(chunks)} virtual pipeline stages are not supported; the nearest legal vp is 1"
        )
    model = unwrap(chunks[0])
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    finalize, model.config.finalize_model_grads_func = model.config.finalize_model_grads_func, None
    model.requires_grad_(False)
    hook = None
    if model.pre_process:  # where the graph begins; later stages get their input with a gradient
        hook = model.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        if hook is not None:
            hook.remove()
        for parameter in wanted:
            parameter.requires_grad_()
        model.config.finalize_model_grads_func = finalize


def run_backward(chunks: Sequence[Any], rows: list[Batch], collector: Any) -> None:
    """Every micro-batch forward and backward, one by one, by Megatron's own schedule of the layout."""
    for batch in rows:
        collector.expect(batch)
        get_forward_backward_func()(
            forward_step_func=_step(collector.architecture.vocab_size),
            data_iterator=iter([batch]),
            model=chunks[0],
            num_microbatches=1,
            seq_length=batch["tokens"].shape[1],
            micro_batch_size=batch["tokens"].shape[0],
            forward_only=False,
        )
        collector.flush()


def _step(vocab_size: int) -> Any:
    def step(iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        batch = next(iterator)

        def loss(logits: Tensor) -> tuple[Tensor, Tensor, dict]:
            # Of three values Megatron divides by the second alone; of two it would scale by context parallelism.
            return total_loss(logits, batch, vocab_size), torch.ones((), dtype=torch.int, device=logits.device), {}

        return model(**forward_arguments(batch)), loss

    return step


def total_loss(logits: Tensor, batch: Batch, vocab_size: int) -> Tensor:
    """The sum of the losses of this context-parallel rank's tokens; [B, S/cp, V/tp] logits, padding behind V."""
    labels, counted = next_tokens(batch)
    cut = get_batch_on_this_cp_rank({"labels": labels, "counted": counted})
    start = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    padding = torch.arange(start, start + logits.shape[-1], device=logits.device) >= vocab_size
    masked = logits.float().masked_fill(padding, float("-inf")).transpose(0, 1).contiguous()
    losses = vocab_parallel_cross_entropy(masked, cut["labels"].to(logits.device).t().contiguous())
    return (losses * cut["counted"].to(logits.device).t()).sum()


def next_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """int64 labels and bool [B, S]: a prediction counts where its position and the next are one sample's and count."""
    tokens, counts = batch["tokens"], batch["loss_mask"] != 0
    first = torch.zeros(tokens.shape[1], dtype=torch.bool)  # a sample's first token is predicted by nothing of it
    first[0] = True
    if "cu_seqlens" in batch:
        boundaries = batch["cu_seqlens"]
        first[boundaries[boundaries < tokens.shape[1]]] = True
        counts = counts & (torch.arange(tokens.shape[1]) < boundaries[-1])
    return tokens.roll(-1, 1), counts & counts.roll(-1, 1) & ~first.roll(-1)
