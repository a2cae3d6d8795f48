"""Run by ranks.py in two pipeline stages: saves the distributed optimizer of a tied model in the format that another
layout can read, and writes how far each saved parameter is from the model's own.

Arguments: a file for rank 0's JSON, a list with an entry for each rank: {name: largest difference}, and its numbers of
buckets.
"""

import json
import sys
from pathlib import Path

from workers import leave, process_group


def place(tensor, name=None):
    """Layers are stacked under one name; the offset says which one it is."""
    return name or tensor.key, tuple(tensor.global_offset)


def main():
    with process_group():
        import torch
        from bare_models import build, start
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from nemo_minitron.backend.optimizer import save_whole

        save_whole()
        start(pp=2)
        (chunk,) = build("llama", tied=True)
        settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        wrapped = DistributedDataParallel(chunk.config, settings, chunk)
        adam = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True)
        optimizer = get_megatron_optimizer(adam, [wrapped])
        metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
        metadata |= {"singleton_local_shards": False, "dp_cp_group": wrapped.dp_cp_group}
        model = chunk.sharded_state_dict(metadata=metadata)
        saved = optimizer.sharded_state_dict(model, metadata=metadata)
        own = {
            place(tensor): tensor.data for tensor in nested_values(model) if hasattr(tensor, "global_offset")
        }  # not factories
        found = {}
        for tensor in nested_values(saved):
            kind, _, name = getattr(tensor, "key", "").removeprefix("optimizer.state.").partition(".")
            if (
                kind in ("param", "fp32_param")
                and hasattr(tensor, "global_offset")
                and (at := place(tensor, name)) in own
            ):
                found[str(at)] = (tensor.data.view(-1) - own[at].detach().view(-1)).abs().max().item()
        everything = [None, None]
        torch.distributed.all_gather_object(everything, [found, [len(buffer.buckets) for buffer in wrapped.buffers]])
        if torch.distributed.get_rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(everything))
    leave()
