"""The sums with which a matrix in front of dropped layers learns to write what they wrote (`pruning/gaps.py`).

For a gap, h is the input of the last matrix in front of it that writes to the residual stream, x the stream in front of
the dropped layers, and y the stream behind them. Over tokens, each with the weight w = 1 / |y|^2, these are summed: w h
h^T, w h x^T and w h y^T, and log |y| - log |x|.

A tensor-parallel rank has its own channels of h. It gathers the channels of the other ranks for each micro-batch, and
keeps its own rows of the sums. If the two ends of a gap lie on two pipeline stages, y is sent to the stage of h behind
each micro-batch. Sums over data- and context-parallel ranks are added.

Shapes (docs/shapes.md): N tokens, S positions of the sequence, B sequences, C input channels of the matrix on this
rank, D input channels on all ranks, H hidden channels, W = D + 2H columns of a gap's sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from nemo_minitron.artifacts.blocks import Gap
from nemo_minitron.backend.collectives import gather, gather_first_dim, gather_objects
from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.errors import InputError
from nemo_minitron.importance.batches import Batch, micro_batches
from nemo_minitron.importance.forward import evaluating, run_forward
from nemo_minitron.importance.hooks import Hooks
from nemo_minitron.importance.samples import Samples

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule
    from torch.utils.hooks import RemovableHandle

POSITIONS = 4096  # that are multiplied at a time
LINEARS = {"down.weight": ("mlp", "linear_fc2"), "o.weight": ("self_attention", "linear_proj")}
LINEARS["out.weight"] = ("mixer", "out_proj")


def gap_sums(
    model: MegatronModule | Sequence[MegatronModule], batches: Iterable[Batch | Tensor], gaps: Mapping[Gap, str | None]
) -> tuple[dict[Gap, Tensor], dict[Gap, float]]:
    """(This tensor-parallel rank's rows of the sums of each gap whose matrix this pipeline stage has: fp64 [C, W], D in
    global order; the mean of log |y| - log |x| of every gap, the same on every rank.) Collective over the whole job.

    `gaps`: each gap -> the canonical name, without its layer, of the matrix in front of it; None sums no h. `model` and
    `batches`: as for `gram`; masked positions do not count.

    Raises InputError if there are no batches, and if an activation is not finite.
    """
    chunks = list(model) if isinstance(model, (list, tuple, nn.ModuleList)) else [model]
    virtual = len(chunks) > 1
    rows = micro_batches(batches, unwrap(chunks[0]).config, virtual=virtual)
    together = parallel_state.get_pipeline_model_parallel_world_size() if virtual else 1
    with evaluating(chunks), torch.no_grad(), _Ends(chunks, gaps) as ends:
        for first in range(0, len(rows), together):
            run_forward(chunks, rows[first : first + together], ends)
            ends.add()
    return ends.sums(), ends.growth()


class _Kept(NamedTuple):
    samples: Samples
    value: Tensor


class _Ends(Hooks):
    """Keeps both ends of the gaps of some micro-batches, until `add`."""

    def __init__(self, chunks: Sequence[MegatronModule], gaps: Mapping[Gap, str | None]) -> None:
        layers = [(layer.layer_number - 1, layer) for chunk in chunks for layer in unwrap(chunk).decoder.layers]
        self.gaps, self._layers, config = gaps, layers, unwrap(chunks[0]).config
        self._split, self._hidden = bool(config.sequence_parallel), config.hidden_size
        self._pipeline = parallel_state.get_pipeline_model_parallel_group()
        of_stages = gather_objects([number for number, _ in layers], self._pipeline)
        self._stage_of = {number: stage for stage, numbers in enumerate(of_stages) for number in numbers}
        self._stage = torch.distributed.get_rank(self._pipeline)
        self._kept: dict[tuple[str, int], list[_Kept]] = {}
        self._sums: dict[Gap, Tensor] = {}
        zeros = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
        self._growth = {gap: zeros.clone() for gap in gaps if self._at_home(gap)}  # sum of the logarithms, tokens

    def register(self) -> Iterator[RemovableHandle]:
        fronts, behinds = {gap.first for gap in self.gaps}, {gap.behind for gap in self.gaps}
        writers = {gap.first: writer for gap, writer in self.gaps.items() if writer is not None}
        for number, layer in self._layers:
            if number + 1 in fronts:
                yield layer.register_forward_hook(self._output("front", number + 1))
            if number + 1 in behinds:
                yield layer.register_forward_hook(self._output("behind", number + 1))
            if number == 0 and 0 in fronts:
                yield layer.register_forward_pre_hook(self._input("front", 0), with_kwargs=True)
            if number + 1 in writers:
                block, linear = LINEARS[writers[number + 1]]
                read = getattr(getattr(layer, block), linear)
                yield read.register_forward_pre_hook(self._input("read", number + 1), with_kwargs=True)

    def _output(self, end: str, number: int) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self._keep(end, number, output[0] if isinstance(output, tuple) else output)

        return hook

    def _input(self, end: str, number: int) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._keep(end, number, args[0] if args else kwargs["hidden_states"])

        return hook

    def _keep(self, end: str, number: int, value: Tensor) -> None:
        value = value.detach().float()
        if self._split and end != "read":  # the input of a row-parallel matrix has all positions
            value = gather_first_dim(value, parallel_state.get_tensor_model_parallel_group())
        self._kept.setdefault((end, number), []).append(_Kept(self.in_hand, value))

    # -- sums --------------------------------------------------------------------------------------------
    def _at_home(self, gap: Gap) -> bool:
        """Whether this stage has the front of the gap."""
        return self._stage_of[max(gap.first - 1, 0)] == self._stage

    def add(self) -> None:
        """Adds what was kept, and forgets it."""
        for gap in self.gaps:
            behind = self._brought(gap)
            if self._at_home(gap):
                front, read = self._kept[("front", gap.first)], self._kept.get(("read", gap.first))
                for place, (samples, x_SBH) in enumerate(front):
                    self._add(gap, samples, read[place].value if read else None, x_SBH, behind[place])
        self._kept.clear()

    def _brought(self, gap: Gap) -> list[Tensor]:
        """The stream behind the gap, of each micro-batch, on the stage that has its front."""
        home, far = self._stage_of[max(gap.first - 1, 0)], self._stage_of[gap.behind - 1]
        own = [kept.value for kept in self._kept.get(("behind", gap.behind), ())]
        if home != far and self._stage == far:
            for value in own:
                torch.distributed.send(value.contiguous(), torch.distributed.get_global_rank(self._pipeline, home))
        if home != far and self._stage == home:
            own = [torch.empty_like(kept.value) for kept in self._kept[("front", gap.first)]]
            for value in own:
                torch.distributed.recv(value, torch.distributed.get_global_rank(self._pipeline, far))
        return own

    def _add(self, gap: Gap, samples: Samples, h: Tensor | None, x: Tensor, y: Tensor) -> None:
        ids_SB = samples.places(split=False)
        at = slice(None) if ids_SB is None else (ids_SB >= 0).flatten()
        x_NH, y_NH = (stream.flatten(0, -2)[at] for stream in (x, y))
        grown = (_log_length(y_NH) - _log_length(x_NH)).double()
        self._growth[gap] += torch.stack([grown.sum(), torch.full_like(grown.sum(), len(grown))])
        if h is None:
            return
        for h_NC, x_part_NH, y_part_NH in zip(
            *(part.split(POSITIONS) for part in (h.flatten(0, -2)[at], x_NH, y_NH)), strict=True
        ):
            weighted_CN = h_NC.T / y_part_NH.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
            h_ND = torch.cat(gather(h_NC, parallel_state.get_tensor_model_parallel_group()), dim=1)
            new_CW = torch.cat([weighted_CN @ each for each in (h_ND, x_part_NH, y_part_NH)], dim=1).double()
            self._sums[gap] = self._sums[gap] + new_CW if gap in self._sums else new_CW

    def sums(self) -> dict[Gap, Tensor]:
        for gap in filter(self._at_home, self.gaps):
            if gap in self._sums:
                torch.distributed.all_reduce(self._sums[gap], group=_copies())
                if not torch.isfinite(self._sums[gap]).all():
                    raise InputError(_not_finite(gap))
        return self._sums

    def growth(self) -> dict[Gap, float]:
        for gap in self._growth:
            torch.distributed.all_reduce(self._growth[gap], group=_copies())
        own = {tuple(gap): float(total / count) for gap, (total, count) in self._growth.items()}
        found = {
            gap: value for part in gather_objects(own, torch.distributed.group.WORLD) for gap, value in part.items()
        }
        for gap, value in found.items():
            if not math.isfinite(value):
                raise InputError(_not_finite(Gap(*gap)))
        return {gap: found[tuple(gap)] for gap in self.gaps}


def _log_length(x_NH: Tensor) -> Tensor:
    return x_NH.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny).log()


def _copies() -> torch.distributed.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _not_finite(gap: Gap) -> str:
    return (
        f"the residual stream around layers {gap.first} to {gap.behind - 1} is not finite; calibrate in fp32, or check "
        "the model"
    )
