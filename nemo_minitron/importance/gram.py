"""Second moments of the inputs of each layer's `down` and `o`. A compensated cut is fitted to them.

G = sum over tokens of x x^T, where x is the input of a row-parallel linear layer in the uncut model. The sums of
micro-batches and of data- and context-parallel ranks are added. A tensor-parallel rank has its own channels of x. It
gathers the channels of the other ranks for each micro-batch, and keeps its own rows of G. For a wide model G is large,
D^2 numbers a matrix: ask for a few layers at a time.

A routed expert has a G of the tokens that came to it. It is split by the experts' tensor parallelism and summed over
the expert's copies. Its x carries the router's probability (`estimators/moe.py`), so W x is what the layer adds.

Each half of the samples can have a G of its own. A sample's half depends on its tokens alone (`samples.py`), so every
layout deals alike.

Shapes (docs/shapes.md): N tokens, S positions of the sequence, B sequences, C input channels of the linear layer on
this rank, D input channels on all ranks, Z the two halves of the samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from nemo_minitron.axes import split_expert, split_name
from nemo_minitron.backend.collectives import gather
from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.errors import InputError
from nemo_minitron.importance.batches import Batch, micro_batches
from nemo_minitron.importance.estimators.moe import second_matrices
from nemo_minitron.importance.experts import HALVES, align_of, by_expert, local_halves
from nemo_minitron.importance.forward import evaluating, run_forward
from nemo_minitron.importance.hooks import Hooks

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from torch.distributed import ProcessGroup
    from torch.utils.hooks import RemovableHandle

KINDS = ("down", "o", "experts")
POSITIONS = 4096  # that are multiplied at a time: a hook holds an fp32 copy of them beside G


def gram(
    model: MegatronModule,
    batches: Iterable[Batch | Tensor],
    layers: Iterable[int] | None = None,
    kinds: Iterable[str] = KINDS,
    halves: bool = False,
) -> dict[str, Tensor]:
    """This tensor-parallel rank's rows of each G of this pipeline stage: fp64 [C, D], D in global order. With `halves`
    it is [Z, C, D], the G of each half of the samples.

    Keys are canonical names of the layer's weight. For `layers.3.down.weight` D is the ffn size, for
    `layers.3.o.weight` it is heads x head_dim, and for `layers.3.experts.1.down.weight` it is the experts' ffn size. A
    rank has the experts that it holds; a shared expert has no G. `model` and `batches`: as for `estimate`; masked
    positions do not count. `layers`: 0-based, all unless given. `kinds`: some of KINDS. The numbers are sums over all
    data- and context-parallel ranks. Collective over the whole job. `whole` joins the rows of one G.

    Raises InputError if there are no batches, if an input is not finite, and for experts that cannot be watched.
    """
    chunks = list(model) if isinstance(model, (list, tuple, nn.ModuleList)) else [model]
    rows = micro_batches(batches, unwrap(chunks[0]).config, virtual=len(chunks) > 1)
    wanted = None if layers is None else set(layers)
    with evaluating(chunks), torch.no_grad(), _Products(chunks, wanted, tuple(kinds), halves) as products:
        run_forward(chunks, rows, products)
    for name, sums in products.sums.items():
        torch.distributed.all_reduce(sums, group=_groups(name)[0])
        if not torch.isfinite(sums).all():
            raise InputError(f"the input of '{name}' is not finite; calibrate in fp32, or check the model")
    return products.sums


def whole(grams: Mapping[str, Tensor], name: str) -> np.ndarray | None:
    """The G of `name`, fp64 [D, D] (or [Z, D, D]) in the CPU's memory, on one of the ranks that have rows of it; None
    elsewhere.

    That rank fits the matrix. Collective over the ranks that share a copy of G.
    """
    copies, shards = _groups(name)
    if name not in grams or torch.distributed.get_rank(copies):
        return None
    rows, parts = grams[name], None
    if torch.distributed.get_rank(shards) == 0:
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size(shards))]
    torch.distributed.gather(rows, parts, torch.distributed.get_global_rank(shards, 0), group=shards)
    return None if parts is None else torch.cat(parts, dim=-2).cpu().numpy()


def _groups(name: str) -> tuple[ProcessGroup, ProcessGroup]:
    """(The group whose ranks have other tokens, the group whose ranks have other channels.)"""
    if split_expert(split_name(name)[1])[0] is not None:
        return parallel_state.get_expert_data_parallel_group(), parallel_state.get_expert_tensor_parallel_group()
    copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return copies, parallel_state.get_tensor_model_parallel_group()


@dataclasses.dataclass(frozen=True)
class _Input:
    """The input of `linear`. `names`: local expert (None in a dense layer) -> canonical name of the weight.

    If a linear has several experts, their tokens lie one expert after another. `routes`: the layer's token dispatcher.
    """

    linear: nn.Module
    names: dict[int | None, str]
    routes: MoETokenDispatcher | None = None


class _Products(Hooks):
    """Adds x x^T of each micro-batch."""

    def __init__(
        self, chunks: Iterable[MegatronModule], layers: set[int] | None, kinds: tuple[str, ...], halves: bool
    ) -> None:
        self.sums: dict[str, Tensor] = {}
        self._halves = halves
        self._watched = [
            linear_input
            for chunk in map(unwrap, chunks)
            for layer in chunk.decoder.layers
            if layers is None or layer.layer_number - 1 in layers
            for linear_input in _inputs(layer, kinds)
        ]

    def register(self) -> Iterator[RemovableHandle]:
        for watched in self._watched:
            yield watched.linear.register_forward_pre_hook(self._hook(watched))

    def _hook(self, watched: _Input) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, args: tuple) -> None:
            for name, x_NC, half_N in self._counted(watched, args[0].detach()):
                for part_NC, of_part_N in zip(x_NC.float().split(POSITIONS), half_N.split(POSITIONS), strict=True):
                    self._add(name, part_NC, of_part_N)

        return hook

    def _counted(self, watched: _Input, x: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each name with the inputs of its tokens that count [N, C], and their halves int64 [N]."""
        x_NC = x.flatten(0, -2)
        if watched.routes is None:  # the input has all positions, also under sequence parallelism
            half_N = self.in_hand.halves(split=False, length=len(x)).flatten()
            at = slice(None) if self.in_hand.ids is None else half_N >= 0
            yield watched.names[None], x_NC[at], half_N[at]
            return
        halves = local_halves(watched.routes, self.in_hand)
        half_of_expert = [halves[expert] for expert in watched.names if expert is not None]
        parts = by_expert(x_NC, list(map(len, half_of_expert)), align_of(watched.routes.config))
        for name, part_NC, half_N in zip(watched.names.values(), parts, half_of_expert, strict=True):
            yield name, part_NC[half_N >= 0], half_N[half_N >= 0]

    def _add(self, name: str, x_NC: Tensor, half_N: Tensor) -> None:
        x_ND = torch.cat(gather(x_NC, _groups(name)[1]), dim=1)
        if self._halves:
            new = torch.stack([x_NC[half_N == z].T @ x_ND[half_N == z] for z in range(HALVES)]).double()
        else:
            new = (x_NC.T @ x_ND).double()
        self.sums[name] = self.sums[name] + new if name in self.sums else new


def _inputs(layer: TransformerLayer, kinds: tuple[str, ...]) -> Iterator[_Input]:
    """The inputs to watch in a transformer layer; none in a Mamba layer."""
    prefix, mlp = f"layers.{layer.layer_number - 1}.", getattr(layer, "mlp", None)
    dense = {
        "o": getattr(getattr(layer, "self_attention", None), "linear_proj", None),
        "down": getattr(mlp, "linear_fc2", None),
    }
    for kind, linear in dense.items():
        if kind in kinds and linear is not None:
            yield _Input(linear, {None: f"{prefix}{kind}.weight"})
    if "experts" in kinds and mlp is not None and hasattr(mlp, "experts"):
        yield from _expert_inputs(mlp, prefix)


def _expert_inputs(mixture: nn.Module, prefix: str) -> Iterator[_Input]:
    numbers = mixture.local_expert_indices
    for expert, linear, routes in second_matrices(mixture):
        local = range(len(numbers)) if expert is None else [expert]
        names: dict[int | None, str] = {e: f"{prefix}experts.{numbers[e]}.down.weight" for e in local}
        yield _Input(linear, names, routes)
