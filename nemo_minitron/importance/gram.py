"""Second moments of what goes into each layer's `down` and `o`: what a compensated cut is solved from.

G = sum over tokens of x x^T, of the input x [C] of a row-parallel linear in the uncut model. Sums merge by adding:
over micro-batches, data- and context-parallel ranks. Tensor-parallel ranks hold their own channels of x; each
gathers the others' of a micro-batch and keeps its own rows of G, [C / tp, C]. C^2 numbers a matrix are much for wide
models: ask for a few layers at a time.

A routed expert has a G of the tokens that came to it, from its ranks: split by the experts' tensor parallelism, summed
over its copies. Its x carries the router's probability (`estimators/moe.py`), so W x is what the layer adds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from nemo_minitron.axes import split_expert, split_name
from nemo_minitron.backend.collectives import gather
from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.errors import InputError
from nemo_minitron.importance.batches import micro_batches
from nemo_minitron.importance.estimators.moe import second_matrices
from nemo_minitron.importance.experts import align_of, by_expert, local_halves
from nemo_minitron.importance.forward import evaluating, run_forward
from nemo_minitron.importance.samples import Samples, samples_of

KINDS = ("down", "o", "experts")
POSITIONS = 4096  # that are multiplied at once: their fp32 copy is what a hook holds beside G


def gram(
    model: Any, batches: Iterable[Any], layers: Iterable[int] | None = None, kinds: Iterable[str] = KINDS
) -> dict[str, Tensor]:
    """This tensor-parallel rank's rows of each G of this pipeline stage: fp64 [C / tp, C], in global order of C.

    Keys are canonical names of the linear's weight: `layers.3.down.weight`, C the ffn size; `layers.3.o.weight`,
    C = heads x head_dim; `layers.3.experts.1.down.weight`, C the experts' ffn size, of the experts that this rank
    holds ([C / etp, C]; a shared expert has none). `model`, `batches`: as for `estimate`; masked positions do not
    count. `layers`: 0-based, all unless given; `kinds` of KINDS. Sums of all data- and context-parallel ranks.
    Collective over the whole job; `whole` puts one G together. Raises InputError for no batches, inputs that are not
    finite, and experts that cannot be watched.
    """
    chunks = list(model) if isinstance(model, (list, tuple, nn.ModuleList)) else [model]
    rows = micro_batches(batches, unwrap(chunks[0]).config, virtual=len(chunks) > 1)
    wanted = None if layers is None else set(layers)
    with evaluating(chunks), torch.no_grad(), _Products(chunks, wanted, tuple(kinds)) as products:
        run_forward(chunks, rows, products)
    for name, sums in products.sums.items():
        torch.distributed.all_reduce(sums, group=_groups(name)[0])
        if not torch.isfinite(sums).all():
            raise InputError(f"what goes into '{name}' is not finite; calibrate in fp32, or check the model")
    return products.sums


def whole(grams: Mapping[str, Tensor], name: str) -> np.ndarray | None:
    """The G of `name`, fp64 [C, C] in the host's memory, on one rank of all that have rows of it: the one that is to
    solve for it. None elsewhere. Collective over the ranks that share a copy of it."""
    copies, shards = _groups(name)
    if name not in grams or torch.distributed.get_rank(copies):
        return None
    own, parts = grams[name], None
    if torch.distributed.get_rank(shards) == 0:
        parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(shards))]
    torch.distributed.gather(own, parts, torch.distributed.get_global_rank(shards, 0), group=shards)
    return None if parts is None else torch.cat(parts).cpu().numpy()


def _groups(name: str) -> tuple[Any, Any]:
    """The group whose ranks saw other tokens, and the one whose ranks hold other channels."""
    if split_expert(split_name(name)[1])[0] is not None:
        return parallel_state.get_expert_data_parallel_group(), parallel_state.get_expert_tensor_parallel_group()
    copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return copies, parallel_state.get_tensor_model_parallel_group()


@dataclasses.dataclass(frozen=True)
class _Input:
    """What goes into `linear`: of `names` in turn, each a local expert's number (None in a dense layer) and a canonical
    name. `routes`: the layer's token dispatcher."""

    linear: nn.Module
    names: dict[int | None, str]
    routes: Any = None


class _Products:
    """Hooks that add x x^T while they are open. `expect` is told of each micro-batch, as a Collector is."""

    def __init__(self, chunks: Iterable[Any], layers: set[int] | None, kinds: tuple[str, ...]) -> None:
        self.sums: dict[str, Tensor] = {}
        self._watched = [
            found
            for chunk in map(unwrap, chunks)
            for layer in chunk.decoder.layers
            if layers is None or layer.layer_number - 1 in layers
            for found in _inputs(layer, kinds)
        ]
        self._samples: Samples | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> _Products:
        for found in self._watched:
            self._handles.append(found.linear.register_forward_pre_hook(self._hook(found)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def expect(self, batch: Mapping[str, Any], first: bool = True) -> None:
        self._samples = samples_of(batch)

    def _hook(self, found: _Input) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            x_PC = args[0].detach().flatten(0, -2)
            for name, part in self._counted(found, x_PC):
                for some in part.float().split(POSITIONS):
                    self._add(name, some)

        return hook

    def _counted(self, found: _Input, x_PC: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each name's positions, but for those that do not count."""
        assert self._samples is not None
        if found.routes is None:  # [S, B, C / tp]: whole sequences, also under sequence parallelism
            places = self._samples.places(split=False)
            yield found.names[None], x_PC if places is None else x_PC[(places >= 0).flatten()]
            return
        halves = local_halves(found.routes, self._samples)
        came = [halves[expert] for expert in found.names if expert is not None]
        parts = by_expert(x_PC, list(map(len, came)), align_of(found.routes.config))
        for name, part, half in zip(found.names.values(), parts, came, strict=True):
            yield name, part[half >= 0]

    def _add(self, name: str, own_PC: Tensor) -> None:
        _, shards = _groups(name)
        product = (own_PC.T @ torch.cat(gather(own_PC, shards), dim=1)).double()
        self.sums[name] = self.sums[name] + product if name in self.sums else product


def _inputs(layer: Any, kinds: tuple[str, ...]) -> Iterator[_Input]:
    """Where to look in a transformer layer."""
    prefix = f"layers.{layer.layer_number - 1}."
    dense = {
        "o": getattr(layer.self_attention, "linear_proj", None),
        "down": getattr(layer.mlp, "linear_fc2", None),
    }
    for kind, linear in dense.items():
        if kind in kinds and linear is not None:
            yield _Input(linear, {None: f"{prefix}{kind}.weight"})
    if "experts" in kinds and hasattr(layer.mlp, "experts"):
        yield from _expert_inputs(layer.mlp, prefix)


def _expert_inputs(mixture: Any, prefix: str) -> Iterator[_Input]:
    numbers = mixture.local_expert_indices
    for expert, linear, routes in second_matrices(mixture):
        local = range(len(numbers)) if expert is None else [expert]
        names: dict[int | None, str] = {e: f"{prefix}experts.{numbers[e]}.down.weight" for e in local}
        yield _Input(linear, names, routes)
