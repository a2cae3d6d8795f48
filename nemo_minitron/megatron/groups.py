"""Megatron's parallel groups: a layout is given to them, or read from those of a running job."""

from __future__ import annotations

import os

import torch
from megatron.core import parallel_state, tensor_parallel

import nemo_minitron.backend as backend
from nemo_minitron.errors import InputError
from nemo_minitron.settings.layout import Layout


def start(layout: Layout | None = None, seed: int = 1234) -> None:
    """Starts the process group and Megatron's parallel groups, if they do not exist yet. Collective.

    Raises InputError if the layout does not fit the number of processes.
    """
    backend.setup()
    layout = layout or Layout()
    if not torch.distributed.is_initialized():
        _process_group()
    if not parallel_state.model_parallel_is_initialized():
        world = torch.distributed.get_world_size()
        if world != layout.processes:
            raise InputError(f"the layout {layout} needs {layout.processes} processes; there are {world}")
        parallel_state.initialize_model_parallel(**group_sizes(layout))
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def group_sizes(layout: Layout) -> dict[str, int | None]:
    """The sizes of a layout's parallel groups under Megatron's names."""
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vp if layout.vp > 1 else None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
    }


def model_sizes(layout: Layout) -> dict[str, int | bool | None]:
    """A layout as the fields of Megatron's model config: the sizes of its groups and what the model does in them."""
    return {
        **group_sizes(layout),
        "num_layers_in_first_pipeline_stage": layout.first_stage or None,
        "num_layers_in_last_pipeline_stage": layout.last_stage or None,
        "sequence_parallel": layout.sp and layout.tp > 1,
    }


def _process_group() -> None:
    """A group of all processes: NCCL on GPUs, gloo without. Each process takes the GPU of its local rank."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if "MASTER_ADDR" in os.environ:
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
    else:  # one process, not under torchrun: no port is opened
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("nccl" if gpu else "gloo", store=store, rank=0, world_size=1)


def current_layout(sp: bool = False) -> Layout:
    """The layout of this process's parallel groups. They do not say whether a model runs sequence parallelism, so the
    caller does, by `sp`."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    etp = parallel_state.get_expert_tensor_parallel_world_size()
    return Layout(
        tp=tp,
        pp=parallel_state.get_pipeline_model_parallel_world_size(),
        vp=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        cp=parallel_state.get_context_parallel_world_size(),
        ep=parallel_state.get_expert_model_parallel_world_size(),
        etp=0 if etp == tp else etp,
        dp=parallel_state.get_data_parallel_world_size(),
        sp=sp,
    )
