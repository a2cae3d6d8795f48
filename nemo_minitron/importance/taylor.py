"""Taylor scores: |activation x gradient|, the first-order change of the loss if the activation is cut.

2407.14679 (section 2.2) leaves this alternative out for its cost, a backward pass for each batch. The loss is the sum
over the next tokens of all tokens that count. So neither the layout nor the number of samples scales a score. The
products go through the same aggregations as activations do.

Shapes (docs/shapes.md): B sequences, S positions of the sequence, W columns of the vocabulary on this rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from nemo_minitron.backend.differences import batch_on_this_cp_rank
from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.errors import InputError
from nemo_minitron.importance.batches import Batch, forward_arguments

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

    from nemo_minitron.importance.collector import Collector

Loss = Callable[[Tensor], tuple[Tensor, Tensor, dict]]


@contextlib.contextmanager
def differentiable(chunks: Sequence[MegatronModule]) -> Iterator[None]:
    """A context in which activations have gradients and parameters have none. Afterwards each model is as before.

    Raises InputError for virtual pipeline stages.
    """
    if len(chunks) > 1:
        raise InputError(
            f"Taylor scores under vp={len(chunks)} virtual pipeline stages are not supported; the nearest legal vp is 1"
        )
    model = unwrap(chunks[0])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
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
        for parameter in trainable:
            parameter.requires_grad_()
        model.config.finalize_model_grads_func = finalize


def run_backward(chunks: Sequence[MegatronModule], rows: list[Batch], collector: Collector) -> None:
    """Runs every micro-batch forward and backward, one by one, by Megatron's own schedule of the layout."""
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


def _step(vocab_size: int) -> Callable[[Iterator[Batch], MegatronModule], tuple[Tensor, Loss]]:
    def step(iterator: Iterator[Batch], model: MegatronModule) -> tuple[Tensor, Loss]:
        batch = next(iterator)

        def loss(logits: Tensor) -> tuple[Tensor, Tensor, dict]:
            # With three values Megatron only divides by the second. With two it would also scale by context
            # parallelism.
            return total_loss(logits, batch, vocab_size), torch.ones((), dtype=torch.int, device=logits.device), {}

        return model(**forward_arguments(batch, model)), loss

    return step


def total_loss(logits_BSW: Tensor, batch: Batch, vocab_size: int) -> Tensor:
    """The sum of the losses of this context-parallel rank's tokens."""
    labels, counted = next_tokens(batch)
    cut = batch_on_this_cp_rank({"labels": labels, "counted": counted})
    start, width = parallel_state.get_tensor_model_parallel_rank() * logits_BSW.shape[-1], logits_BSW.shape[-1]
    padding_W = torch.arange(start, start + width, device=logits_BSW.device) >= vocab_size
    masked_SBW = logits_BSW.float().masked_fill(padding_W, float("-inf")).transpose(0, 1).contiguous()
    loss_SB = vocab_parallel_cross_entropy(masked_SBW, cut["labels"].to(logits_BSW.device).t().contiguous())
    return (loss_SB * cut["counted"].to(logits_BSW.device).t()).sum()


def next_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """int64 labels [B, S], and bool [B, S], whether the prediction counts.

    It does if its position and the next one belong to one sample, and both count.
    """
    tokens, counts_BS = batch["tokens"], batch["loss_mask"] != 0
    # The first token of a sample has nothing to predict it from.
    first_S = torch.zeros(tokens.shape[1], dtype=torch.bool)
    first_S[0] = True
    if "cu_seqlens" in batch:
        boundaries = batch["cu_seqlens"]
        first_S[boundaries[boundaries < tokens.shape[1]]] = True
        counts_BS = counts_BS & (torch.arange(tokens.shape[1]) < boundaries[-1])
    return tokens.roll(-1, 1), counts_BS & counts_BS.roll(-1, 1) & ~first_S.roll(-1)
