"""What every rank has gathered -> Scores in global order, the same on every rank (DESIGN, section 3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from nemo_minitron.artifacts.scores import Scores
from nemo_minitron.importance.collector import Collector, merge_over
from nemo_minitron.importance.statistics import AGGREGATIONS, State


def reduce(collector: Collector, norms: str = "all") -> Scores:
    """Merges over data-parallel ranks, finishes, concatenates channels over TP, places rows over PP.

    Collective: every rank of the job must call it. `norms`: "all", or "layers" to leave the final norm out
    of `hidden`.
    """
    tensors, states = {}, {}
    for axis in collector.axes:
        rows = _gather_rows(collector, axis)
        if not rows:
            continue
        aggregation = _aggregation(collector, axis)
        tensors[axis] = np.stack([aggregation.finish(rows[row]).float().numpy() for row in sorted(rows)])
        for i, field in enumerate(aggregation.fields):
            states[f"{axis}/{field}"] = np.stack([rows[row][i].numpy() for row in sorted(rows)])
    if "norms" in tensors:
        kept = tensors["norms"] if norms == "all" else tensors["norms"][:-1]
        tensors["hidden"] = kept.sum(0, dtype=np.float64).astype(np.float32)
    if "heads" in tensors:
        groups = collector.architecture.num_query_groups
        tensors["query_groups"] = tensors["heads"].reshape(len(tensors["heads"]), groups, -1).sum(-1)
    samples, tokens = _counts(collector)
    scores = Scores(
        collector.architecture,
        tensors,
        criterion=collector.criterion,
        norms=norms,
        samples=samples,
        tokens=tokens,
        layout=layout(),
        states=states,
    )
    scores.check()
    return scores


def _aggregation(collector: Collector, axis: str) -> Any:
    return collector.over_samples if collector.estimators[axis].aggregate else AGGREGATIONS["mean"]


def _gather_rows(collector: Collector, axis: str) -> dict[int, State]:
    """Row -> state of all samples and all channels, on the CPU, from all stages of the pipeline."""
    data = parallel_state.get_data_parallel_group()
    tensor = parallel_state.get_tensor_model_parallel_group()
    rows = {}
    for row, state in sorted(collector.states[axis].items()):
        merged = merge_over([data], _aggregation(collector, axis), state)
        if collector.estimators[axis].sharded:
            merged = tuple(_concatenate(part, tensor) for part in merged)
        rows[row] = tuple(part.cpu() for part in merged)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    stages: list[dict[int, State]] = [{} for _ in range(torch.distributed.get_world_size(pipeline))]
    torch.distributed.all_gather_object(stages, rows, group=pipeline)
    return {row: state for stage in stages for row, state in stage.items()}


def _concatenate(part: torch.Tensor, group: Any) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


def _counts(collector: Collector) -> tuple[int, int]:
    """Samples and tokens of the whole job: summed over data parallelism; NeMo shows tokens to the first stage alone."""
    counts = torch.tensor([collector.samples, collector.tokens], device=torch.cuda.current_device())
    torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    stages = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX, group=stages)
    return int(counts[0]), int(counts[1])


def layout() -> dict[str, int]:
    """This job's layout, for the record."""
    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "cp": parallel_state.get_context_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
    }
