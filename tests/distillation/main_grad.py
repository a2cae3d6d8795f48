"""Run by cache_worker.py: a step's gradients in Megatron's DDP buffers, the fused head's added there at once or later.

Three micro-batches through Megatron's schedule, reductions overlapped with the backward pass, whose hook insists on a
gradient from autograd.
"""

CASES = {  # name -> layout, fields, tied
    "dp2_tied": ({}, {}, True),
    "tp2": ({"tp": 2}, {}, True),
    "tp2_sp": ({"tp": 2}, {"sequence_parallel": True}, False),
    "pp2_tied": ({"pp": 2}, {}, True),
}
MICRO_BATCHES = 3


def measure(case):
    """On this rank: {"apart": the largest difference of the two ways over the largest element of its tensor, "least":
    the least of those largest, "used": whether a head was there to add at once}."""
    from nemo_minitron.distillation import step
    from nemo_minitron.distillation.fused_head import accumulates

    student, teacher = models(*CASES[case])
    used, ways = set(), []
    for at_once in (True, False):
        step.accumulates = lambda weight, on=at_once: used.add(accumulates(weight)) or (on and accumulates(weight))
        ways.append(gradients(student, teacher))
    step.accumulates = accumulates
    largest = {name: other.abs().max().item() for name, other in ways[1].items()}
    apart = max((ways[0][name] - ways[1][name]).abs().max().item() / largest[name] for name in largest)
    return {"apart": apart, "least": min(largest.values()), "used": used == {True}}


def models(sizes, fields, tied):
    """The student in Megatron's DDP and a teacher of its sizes, in this layout."""
    import bare_models
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    from nemo_minitron.distillation.teacher import Teacher

    bare_models.start(**sizes)
    student, teacher = (
        bare_models.build("llama", tied=tied, calculate_per_token_loss=True, **fields)[0] for _ in range(2)
    )
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=True, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(student.config, ddp, student)
    student.config.finalize_model_grads_func, student.config.no_sync_func = finalize_model_grads, wrapped.no_sync
    return wrapped, Teacher([teacher], inputs)


def gradients(student, teacher):
    """Name -> this rank's main_grad after a step, summed over all ranks that share it."""
    import bare_models
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from nemo_minitron.distillation.step import Objective, distillation_step

    forward = distillation_step(Objective(bare_models.VOCAB, logits_weight=0.5), inputs, teacher)
    student.zero_grad_buffer()
    if teacher.staged:
        teacher.ahead(batches(), next, MICRO_BATCHES, bare_models.SEQUENCE, 1)
    get_forward_backward_func()(
        forward_step_func=lambda data, model: (forward(model, next(data)), summed), data_iterator=batches(),
        model=student, num_microbatches=MICRO_BATCHES, seq_length=bare_models.SEQUENCE, micro_batch_size=1,
        forward_only=False,
    )  # fmt: skip
    return {name: parameter.main_grad.clone() for name, parameter in student.named_parameters()}


def batches():
    """One row each, of which the first tokens do not count; every data-parallel rank has its own."""
    import bare_models
    import torch
    from megatron.core import parallel_state

    places = torch.arange(bare_models.SEQUENCE)[None]
    for row in bare_models.tokens(MICRO_BATCHES, seed=parallel_state.get_data_parallel_rank()):
        yield {"tokens": row[None], "position_ids": places, "loss_mask": (places > 4).float()}


def inputs(batch):
    return {"input_ids": batch["tokens"], "position_ids": batch["position_ids"], "attention_mask": None}


def summed(losses):
    mask = next(batches())["loss_mask"]
    return (losses * mask).sum(), mask.sum().int(), {"loss": losses.detach().sum()}
