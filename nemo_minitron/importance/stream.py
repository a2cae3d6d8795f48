"""Second moments of the residual stream in front of its norms, for a rotation of its channels
(`pruning/rotation.py`).

C = the mean over tokens and norms of x x^T, each x divided by its root mean square, as RMSNorm does it. Every rank of a
tensor-parallel group has all channels, under sequence parallelism of its own positions. Sums over positions, norms and
stages are added, so that every layout gives the same C, up to rounding.

Shapes (docs/shapes.md): N tokens, S positions of the sequence, B sequences, H hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.errors import InputError
from nemo_minitron.importance.batches import Batch, micro_batches
from nemo_minitron.importance.collector import with_layers
from nemo_minitron.importance.estimators import estimators_of
from nemo_minitron.importance.forward import architecture_of, evaluating, run_forward
from nemo_minitron.importance.hooks import Hooks

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule
    from torch.utils.hooks import RemovableHandle

    from nemo_minitron.architecture import Architecture

POSITIONS = 4096  # that are multiplied at a time


def stream_covariance(
    model: MegatronModule | Sequence[MegatronModule], batches: Iterable[Batch | Tensor],
    architecture: Architecture | None = None,
) -> Tensor:  # fmt: skip
    """C, fp64 [H, H], with the trace H, the same on every rank. Collective over the whole job.

    `model`, `batches` and `architecture`: as for `estimate`; masked positions do not count. Raises InputError if there
    are no batches, and if an activation is not finite.
    """
    chunks = list(model) if isinstance(model, (list, tuple, nn.ModuleList)) else [model]
    rows = micro_batches(batches, unwrap(chunks[0]).config, virtual=len(chunks) > 1)
    architecture = architecture or architecture_of(unwrap(chunks[0]))
    with evaluating(chunks), torch.no_grad(), _Stream(chunks, architecture) as stream:
        run_forward(chunks, rows, stream)
    sums_HH = stream.sums_HH
    for group in _groups(unwrap(chunks[0]).config.sequence_parallel):
        torch.distributed.all_reduce(sums_HH, group=group)
    if not torch.isfinite(sums_HH).all():
        raise InputError("the residual stream is not finite; calibrate in fp32, or check the model")
    return sums_HH * (len(sums_HH) / sums_HH.trace())


def _groups(split: bool) -> Iterator[torch.distributed.ProcessGroup]:
    """The groups whose ranks have other tokens or other norms. `split`: sequence parallelism shares positions out."""
    yield parallel_state.get_data_parallel_group(with_context_parallel=True)
    if split:
        yield parallel_state.get_tensor_model_parallel_group()
    yield parallel_state.get_pipeline_model_parallel_group()


class _Stream(Hooks):
    """Adds x x^T of each micro-batch."""

    def __init__(self, chunks: Iterable[MegatronModule], architecture: Architecture) -> None:
        self._models = [unwrap(chunk) for chunk in chunks]
        config, device = self._models[0].config, torch.cuda.current_device()
        self.split = bool(config.sequence_parallel)
        self.sums_HH = torch.zeros(config.hidden_size, config.hidden_size, dtype=torch.float64, device=device)
        self._norms = [norm for chunk in self._models for norm in _norms(chunk, architecture)]

    def register(self) -> Iterator[RemovableHandle]:
        for norm in self._norms:
            yield norm.register_forward_pre_hook(self._hook(), with_kwargs=True)

    def _hook(self) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x_NH = (args[0] if args else kwargs["hidden_states"]).detach().flatten(0, -2)
            ids_SB = self.in_hand.places(self.split)
            for part_NH in (x_NH if ids_SB is None else x_NH[(ids_SB >= 0).flatten()]).split(POSITIONS):
                self._add(part_NH.float())

        return hook

    def _add(self, x_NH: Tensor) -> None:
        x_NH = torch.nn.functional.rms_norm(x_NH, x_NH.shape[-1:], eps=torch.finfo(torch.float32).tiny)
        self.sums_HH += (x_NH.T @ x_NH).double()


def _norms(chunk: MegatronModule, architecture: Architecture) -> Iterator[nn.Module]:
    """The modules whose first input is the stream in front of a norm: the norms, or what a norm is fused with."""
    for module, layer in with_layers(chunk.decoder):
        for _, cls in estimators_of(module):
            if cls.axis == "norms":
                yield from (watch.module for watch in cls().watches(module, layer, architecture))
