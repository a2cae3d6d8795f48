"""Started by torchrun: every layout of this number of processes against one process's model, on one batch.

One process's model is kept as a torch_dist checkpoint, which each layout loads into its own shards; each
layout's gradients go into another such checkpoint and come back whole. Prints nothing that matters: its
results are the JSON file that is its argument.
"""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch

import nemo_minitron.backend as backend

MICRO_BATCHES = 8
LAYOUTS = {
    2: {
        "tp2": {"tp": 2},
        "tp2_sp": {"tp": 2, "sp": True},
        "pp2": {"pp": 2},
        "pp2_vp2": {"pp": 2, "vp": 2},
        "dp2": {},
        "dp2_zero": {"zero": True},
        "cp2": {"cp": 2},
        "ep2": {"ep": 2},
    },
    4: {"tp2_sp_pp2_vp2": {"tp": 2, "sp": True, "pp": 2, "vp": 2}, "tp2_dp2_zero": {"tp": 2, "zero": True}},
}
KINDS_OF = {"ep2": ("moe",), "dp2": ("rms", "moe")}


def start(tp=1, pp=1, vp=1, cp=1, ep=1):
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp if vp > 1 else None,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def build(kind, tp=1, pp=1, vp=1, cp=1, ep=1, sp=False, zero=False):
    """This rank's chunks in Megatron's DDP."""
    import backend_pico
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    start(tp, pp, vp, cp, ep)
    made = backend_pico.config(
        kind,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp if vp > 1 else None,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        sequence_parallel=sp,
        perform_initialization=tp == pp == vp == ep == 1,  # the others are filled; their shards need their marks
    )
    made.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=zero)
    chunks = [backend_pico.model(made, vp_stage=stage if vp > 1 else None) for stage in range(vp)]
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        mark(parameter, tp)
    return [DistributedDataParallel(made, ddp, chunk) for chunk in chunks]


def mark(parameter, tp):
    """Megatron's embedding is marked only where it is initialised; it is not this package's layer."""
    import backend_pico

    if parameter.shape[0] == backend_pico.VOCAB // tp and not hasattr(parameter, "tensor_model_parallel"):
        parameter.tensor_model_parallel = True


def batches(rank, size):
    """This data-parallel rank's micro-batches of one sequence each (this context-parallel rank's part of
    it), the same tokens in every layout."""
    import backend_pico
    from megatron.core.utils import get_batch_on_this_cp_rank

    generator = torch.Generator().manual_seed(7)
    shape = (MICRO_BATCHES, backend_pico.SEQUENCE + 1)
    tokens = torch.randint(backend_pico.VOCAB, shape, generator=generator)
    for row in tokens[rank::size]:
        positions = torch.arange(backend_pico.SEQUENCE)[None]
        batch = {"tokens": row[None, :-1], "positions": positions, "labels": row[None, 1:]}
        yield tuple(get_batch_on_this_cp_rank(batch).values())


def step(iterator, chunk):
    from megatron.core import parallel_state

    tokens, positions, labels = next(iterator)
    parts = parallel_state.get_context_parallel_world_size()  # Megatron wants a rank's share of the mean
    return chunk(tokens, positions, None, labels=labels), lambda losses: (
        losses.mean() / parts,
        {"loss": losses.mean()},
    )


def run(chunks, rank, size, forward_only=False):
    """Forward and backward over the batch; the mean loss, on the last stage (else None)."""
    import backend_pico
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for chunk in chunks:
        chunk.zero_grad_buffer()
    iterators = [batches(rank, size) for _ in chunks]
    losses = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=MICRO_BATCHES // size,
        seq_length=backend_pico.SEQUENCE,
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


def sharded(chunks, gradients=False):
    """Megatron's sharded state dict of this rank; with `gradients`, of its parameters' gradients."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    state = {}
    for i, chunk in enumerate(chunks):
        part = chunk.module.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        state[f"model{i}"] = {k: v for k, v in part.items() if not (gradients and k.endswith("_extra_state"))}
        if gradients:
            for value in state[f"model{i}"].values():
                if isinstance(value, (ShardedTensor, ShardedTensorFactory)):
                    value.data = value.data.main_grad.clone()
    return state


def load(chunks, folder):
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(sharded(chunks), str(folder))
    for i, chunk in enumerate(chunks):
        chunk.module.load_state_dict(state[f"model{i}"])


def save(state, folder):
    from megatron.core import dist_checkpointing

    if torch.distributed.get_rank() == 0:
        folder.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder))


def optimizer_step(chunks, zero):
    """One step of Megatron's optimizer with clipping; returns the global norm of the gradients."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    # With so large an epsilon Adam follows the gradient, and not the sign of its rounding errors.
    config = OptimizerConfig(optimizer="adam", lr=1.0, adam_eps=1.0, clip_grad=0.5, use_distributed_optimizer=zero)
    _, norm, _ = get_megatron_optimizer(config, chunks).step()
    return float(norm)


def whole(kind, folder):
    """A checkpoint's tensors, whole, through a one-process model."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    chunks = build(kind)
    state = sharded(chunks)["model0"]
    state = {k: v for k, v in state.items() if isinstance(v, (ShardedTensor, ShardedTensorFactory))}
    return dist_checkpointing.load({"model0": state}, str(folder))["model0"]


def measure(kind, name, options, work):
    """Losses, gradients and their norm of one layout."""
    from megatron.core import parallel_state

    chunks = build(kind, **options)
    if name == "one":
        save(sharded(chunks), work / f"{kind}-weights")
    load(chunks, work / f"{kind}-weights")
    alone = name == "one"
    rank = 0 if alone else parallel_state.get_data_parallel_rank()
    size = 1 if alone else parallel_state.get_data_parallel_world_size()
    result = {"loss": everywhere(run(chunks, rank, size), size)}
    if not options.get("zero"):
        save(sharded(chunks, gradients=True), work / f"{kind}-{name}-gradients")
    result["norm"] = optimizer_step(chunks, options.get("zero", False))
    result["after"] = everywhere(run(chunks, rank, size, forward_only=True), size)
    if not options.get("zero"):
        result["gradients"] = whole(kind, work / f"{kind}-{name}-gradients")
    return result


def difference(got, wanted):
    """The largest difference of any gradient, relative to the largest element of that gradient, and where."""
    assert got.keys() == wanted.keys()
    return max((float((got[k] - wanted[k]).abs().max() / wanted[k].abs().max()), k) for k in wanted)


def main():
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=90))
    backend.setup()
    world, results = torch.distributed.get_world_size(), {}
    folder = [tempfile.mkdtemp()] if torch.distributed.get_rank() == 0 else [None]
    torch.distributed.broadcast_object_list(folder)
    for kind in ("rms", "layer", "moe"):
        base = measure(kind, "one", {}, Path(folder[0]))
        for name, options in LAYOUTS[world].items():
            if kind in KINDS_OF.get(name, ("rms", "layer")):
                got = measure(kind, name, options, Path(folder[0]))
                gradients = difference(got["gradients"], base["gradients"]) if "gradients" in got else (0.0, "")
                results[f"{kind}-{name}"] = {k: [got[k], base[k]] for k in ("loss", "norm", "after")}
                results[f"{kind}-{name}"]["gradients"] = gradients
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
