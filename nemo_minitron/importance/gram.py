"""Second moments of what goes into each layer's `down` and `o`: what a compensated cut is solved from.

G = sum over tokens of x x^T, of the input x [C] of a row-parallel linear in the uncut model. Sums merge by adding:
over micro-batches, data- and context-parallel ranks. Tensor-parallel ranks hold their own channels of x; each
gathers the others' of a micro-batch and keeps its own rows of G, [C / tp, C]. C^2 numbers a matrix are much for wide
models: ask for a few layers at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from nemo_minitron.errors import InputError
from nemo_minitron.importance.batches import micro_batches
from nemo_minitron.importance.collector import unwrap
from nemo_minitron.importance.forward import evaluating, run_forward
from nemo_minitron.importance.samples import Samples, samples_of

POSITIONS = 4096  # that are multiplied at once: their fp32 copy is what a hook holds beside G


def gram(
    model: Any, batches: Iterable[Any], layers: Iterable[int] | None = None, tensors: Iterable[str] = ("down", "o")
) -> dict[str, Tensor]:
    """This tensor-parallel rank's rows of each G of this pipeline stage: fp64 [C / tp, C], in global order of C.

    Keys are canonical names of the linear's weight: `layers.3.down.weight`, C the ffn size; `layers.3.o.weight`,
    C = heads x head_dim. `model`, `batches`: as for `estimate`; masked positions do not count. `layers`: 0-based, all
    unless given; mixtures of experts have no `down` here. Sums of all data- and context-parallel ranks. Collective
    over the whole job; `whole` puts one G together. Raises InputError for no batches and for inputs that are not
    finite.
    """
    chunks = list(model) if isinstance(model, (list, tuple, nn.ModuleList)) else [model]
    rows = micro_batches(batches, unwrap(chunks[0]).config, virtual=len(chunks) > 1)
    wanted = None if layers is None else set(layers)
    with evaluating(chunks), torch.no_grad(), _Products(chunks, wanted, tuple(tensors)) as products:
        run_forward(chunks, rows, products)
    for name, sums in products.sums.items():
        for group in (parallel_state.get_data_parallel_group(), parallel_state.get_context_parallel_group()):
            torch.distributed.all_reduce(sums, group=group)
        if not torch.isfinite(sums).all():
            raise InputError(f"what goes into '{name}' is not finite; calibrate in fp32, or check the model")
    return products.sums


def whole(grams: Mapping[str, Tensor], name: str) -> np.ndarray | None:
    """The G of `name`, fp64 [C, C], on every rank of the stage that has it; None elsewhere. Collective over TP."""
    if name not in grams:
        return None
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(grams[name]) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, grams[name], group=group)
    return torch.cat(parts).cpu().numpy()


class _Products:
    """Hooks that add x x^T while they are open. `expect` is told of each micro-batch, as a Collector is."""

    def __init__(self, chunks: Iterable[Any], layers: set[int] | None, tensors: tuple[str, ...]) -> None:
        self.sums: dict[str, Tensor] = {}
        self._watched = [
            (name, linear)
            for chunk in map(unwrap, chunks)
            for name, linear in _linears(chunk, tensors)
            if layers is None or int(name.split(".")[1]) in layers
        ]
        self._samples: Samples | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> _Products:
        for name, linear in self._watched:
            self._handles.append(linear.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def expect(self, batch: Mapping[str, Any], first: bool = True) -> None:
        self._samples = samples_of(batch)

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            assert self._samples is not None
            x_PC = args[0].detach().flatten(0, 1)  # [S, B, C / tp]: whole sequences, also under sequence parallelism
            places = self._samples.places(split=False)
            if places is not None:
                x_PC = x_PC[(places >= 0).flatten()]
            for part in x_PC.float().split(POSITIONS):
                self._add(name, part)

        return hook

    def _add(self, name: str, own_PC: Tensor) -> None:
        group = parallel_state.get_tensor_model_parallel_group()
        parts = [torch.empty_like(own_PC) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, own_PC.contiguous(), group=group)
        product = (own_PC.T @ torch.cat(parts, dim=1)).double()
        self.sums[name] = self.sums[name] + product if name in self.sums else product


def _linears(chunk: Any, tensors: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Canonical weight names and the linears whose inputs are watched."""
    for layer in chunk.decoder.layers:
        found = {
            "o": getattr(layer.self_attention, "linear_proj", None),
            "down": getattr(layer.mlp, "linear_fc2", None),
        }
        for tensor, linear in found.items():
            if tensor in tensors and linear is not None:
                yield f"layers.{layer.layer_number - 1}.{tensor}.weight", linear
