"""Started by torchrun: every layout of this number of processes against one process's model, on one batch.

One process's model is kept as a torch_dist checkpoint, which each layout loads into its own shards; each
layout's gradients go into another such checkpoint and come back whole. Prints nothing that matters: its
results are the JSON file that is its argument.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from workers import process_group

from nemo_minitron.backend.versions import fits, installed

MICRO_BATCHES = 8
DENSE = ("qk_norm", "nemotron")  # RMSNorm and QK norm; LayerNorm with a zero-centred gamma, biases
KINDS = (*DENSE, "hybrid", "mla", "moe", "mla_moe", "sinks")
BIASED = ("sinks",) if fits(installed("megatron-core") or "0", ">=0.19.dev0") else ()  # under TP; refused before 0.19
TIED = ("qk_norm", "moe")
# A layout's sizes, what else the model's config gets, and the kinds that run in it.
LAYOUTS = {
    2: {
        "tp2": ({"tp": 2}, {}, (*DENSE, "hybrid", "mla")),
        "tp2_sp": ({"tp": 2, "etp": 2}, {"sequence_parallel": True}, KINDS[:-1]),
        "tp2_sp_etp1": ({"tp": 2, "etp": 1}, {"sequence_parallel": True}, ("moe", *BIASED)),
        "tp2_sp_etp2_gather": (
            {"tp": 2, "etp": 2},
            {"sequence_parallel": True, "moe_token_dispatcher_type": "allgather"},
            ("moe",),
        ),
        "tp2_sp_packed": ({"tp": 2}, {"sequence_parallel": True, "packed": True}, ("qk_norm", "mla")),
        "pp2": ({"pp": 2}, {}, ("qk_norm", "hybrid", "mla_moe", "sinks")),
        "pp2_vp2": ({"pp": 2, "vp": 2}, {}, DENSE),
        "dp2": ({}, {}, ("nemotron", "moe")),
        "dp2_zero": ({}, {"zero": True}, ("qk_norm",)),
        "cp2": ({"cp": 2}, {}, ("qk_norm", "hybrid", "mla", "moe", "sinks")),
        "ep2": ({"ep": 2}, {}, ("moe", "mla_moe", "sinks")),
        "ep2_gather": ({"ep": 2}, {"moe_token_dispatcher_type": "allgather"}, ("moe",)),
    },
    4: {
        "tp2_sp_pp2_vp2": ({"tp": 2, "pp": 2, "vp": 2}, {"sequence_parallel": True}, ("nemotron",)),
        "tp2_dp2_zero": ({"tp": 2}, {"zero": True}, ("qk_norm",)),
        "tp2_sp_cp2": ({"tp": 2, "cp": 2}, {"sequence_parallel": True}, ("qk_norm", "mla")),
        "tp2_sp_ep2": ({"tp": 2, "ep": 2, "etp": 1}, {"sequence_parallel": True}, ("moe",)),
        "tp2_sp_ep2_etp2": ({"tp": 2, "ep": 2, "etp": 2}, {"sequence_parallel": True}, ("moe",)),
    },
}


def build(kind, sizes, zero=False, packed=False, **overrides):
    """This rank's chunks in Megatron's DDP, in the layout of these sizes."""
    import bare_models
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    bare_models.start(**sizes)
    alone = not set(sizes) - {"cp"}  # the others are filled; their shards need their marks
    chunks = bare_models.build(kind, tied=kind in TIED, perform_initialization=alone, **overrides)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=zero)
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        for parameter in chunk.parameters():
            mark(parameter, sizes.get("tp", 1))
    return [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]


def mark(parameter, tp):
    """Megatron's embedding is marked only where it is initialised; it is not this package's layer."""
    import bare_models

    if parameter.shape[0] == bare_models.PADDED // tp and not hasattr(parameter, "tensor_model_parallel"):
        parameter.tensor_model_parallel = True


def batches(rank, size):
    """This data-parallel rank's micro-batches of one sequence each (this context-parallel rank's part of
    it), the same tokens in every layout."""
    import bare_models

    from nemo_minitron.backend.differences import batch_on_this_cp_rank

    for row in bare_models.tokens(MICRO_BATCHES, length=bare_models.SEQUENCE + 1)[rank::size]:
        positions = torch.arange(bare_models.SEQUENCE)[None]
        batch = {"tokens": row[None, :-1], "positions": positions, "labels": row[None, 1:]}
        yield tuple(batch_on_this_cp_rank(batch).values())


def packed(rows):
    """Each two of the micro-batches in one row."""
    from megatron.core.packed_seq_params import PackedSeqParams

    for first, second in zip(rows, rows, strict=True):
        length = first[0].shape[1]
        ends = torch.tensor([0, length, 2 * length], dtype=torch.int32)
        params = PackedSeqParams("thd", ends, ends, None, None, length, length)
        yield *(torch.cat(pair, dim=1) for pair in zip(first, second, strict=True)), params


def step(iterator, chunk):
    from megatron.core import parallel_state

    tokens, positions, labels, *params = next(iterator)
    parts = parallel_state.get_context_parallel_world_size()  # Megatron wants a rank's share of the mean
    packed = {"packed_seq_params": params[0]} if params else {}  # a hybrid of Megatron-core 0.15 knows no such thing
    output = chunk(tokens, positions, None, labels=labels, **packed)
    return output, lambda losses: (
        losses.mean() / parts,
        {"loss": losses.mean()},
    )


def run(chunks, rank, size, packing=False, forward_only=False):
    """Forward and backward over the batch; the mean loss, on the last stage (else None)."""
    import bare_models
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for chunk in chunks:
        chunk.zero_grad_buffer()
    iterators = [packed(batches(rank, size)) if packing else batches(rank, size) for _ in chunks]
    losses = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=MICRO_BATCHES // size // (1 + packing),
        seq_length=bare_models.SEQUENCE,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return sum(float(each["loss"]) for each in losses) / len(losses) if losses else None


def everywhere(loss, size):
    """The loss of the whole batch, on every rank: the mean over the ranks that have one."""
    got = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(got, loss)
    have = [each for each in got if each is not None]
    return sum(have) / len(have)


def sharded_gradients(chunks):
    """Megatron's sharded state dict of this rank, with each parameter's gradient in its place."""
    import bare_models
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    state = bare_models.sharded([chunk.module for chunk in chunks])
    for name, part in state.items():
        kept = {k: v for k, v in part.items() if isinstance(v, (ShardedTensor, ShardedTensorFactory))}
        state[name] = {k: v for k, v in kept.items() if hasattr(v.data, "main_grad")}
        for value in state[name].values():
            value.data = value.data.main_grad.clone()
    return state


def optimizer_step(chunks, zero):
    """One step of Megatron's optimizer with clipping; returns the global norm of the gradients."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    # With so large an epsilon Adam follows the gradient, and not the sign of its rounding errors.
    config = OptimizerConfig(optimizer="adam", lr=1.0, adam_eps=1.0, clip_grad=0.5, use_distributed_optimizer=zero)
    _, norm, _ = get_megatron_optimizer(config, chunks).step()
    return float(norm)


def save(state, folder):
    from megatron.core import dist_checkpointing

    if torch.distributed.get_rank() == 0:
        folder.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder))


def whole(kind, folder):
    """A checkpoint's tensors, whole, through a one-process model."""
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load(sharded_gradients(build(kind, {})), str(folder))["model0"]


def measure(kind, name, sizes, options, work):
    """Losses, gradients and their norm of one layout."""
    import bare_models
    from megatron.core import parallel_state

    chunks, alone = build(kind, sizes, **options), name == "one"
    zero, packing = options.get("zero", False), options.get("packed", False)
    modules = [chunk.module for chunk in chunks]
    if alone:
        bare_models.save_bare(modules, work / f"{kind}-weights")
    bare_models.load_bare(modules, work / f"{kind}-weights")
    rank = 0 if alone else parallel_state.get_data_parallel_rank()
    size = 1 if alone else parallel_state.get_data_parallel_world_size()
    result = {"loss": everywhere(run(chunks, rank, size, packing), size)}
    if not zero:
        save(sharded_gradients(chunks), work / f"{kind}-{name}-gradients")
    result["norm"] = optimizer_step(chunks, zero)
    result["after"] = everywhere(run(chunks, rank, size, packing, forward_only=True), size)
    if not zero:
        result["gradients"] = whole(kind, work / f"{kind}-{name}-gradients")
    return result


def difference(got, wanted):
    """The largest difference of any gradient, relative to the largest element of that gradient, and where."""
    assert got.keys() == wanted.keys()
    return max((float((got[k] - wanted[k]).abs().max() / wanted[k].abs().max()), k) for k in wanted)


def main():
    with process_group():
        world, results = torch.distributed.get_world_size(), {}
        folder = [tempfile.mkdtemp()] if torch.distributed.get_rank() == 0 else [None]
        torch.distributed.broadcast_object_list(folder)
        for kind in KINDS:
            layouts = {name: layout[:2] for name, layout in LAYOUTS[world].items() if kind in layout[2]}
            base = measure(kind, "one", {}, {}, Path(folder[0])) if layouts else {}
            for name, (sizes, options) in layouts.items():
                got = measure(kind, name, sizes, options, Path(folder[0]))
                gradients = difference(got["gradients"], base["gradients"]) if "gradients" in got else (0.0, "")
                results[f"{kind}-{name}"] = {k: [got[k], base[k]] for k in ("loss", "norm", "after")}
                results[f"{kind}-{name}"]["gradients"] = gradients
        if torch.distributed.get_rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
