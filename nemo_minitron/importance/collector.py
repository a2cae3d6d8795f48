"""Hooks on a live model, and the statistics that they gather on this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.scores import ACTIVATION
from nemo_minitron.backend.collectives import gather_objects
from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.importance.accumulator import Accumulator
from nemo_minitron.importance.estimators import Estimator, Watch, estimators_of
from nemo_minitron.importance.experts import ExpertAccumulator
from nemo_minitron.importance.hooks import Hooks
from nemo_minitron.importance.registry import Output, check_claimed
from nemo_minitron.importance.statistics import criterion

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule
    from torch.utils.hooks import RemovableHandle

WIDTH_AXES = (
    "ffn", "heads", "mamba_channels", "norms", "experts", "expert_ffn", "shared_expert_ffn", "q_latent", "kv_latent",
)  # fmt: skip
DEFAULT_AXES = (*WIDTH_AXES, "layers", "stream_logs")
TAYLOR = "taylor"
METHODS = (ACTIVATION, TAYLOR)

Hook = Callable[[nn.Module, tuple, dict, Output], None]
Watches = dict[tuple[str, int, int | None], tuple[Estimator, Watch]]


class Collector(Hooks):
    """Watches the model chunks of this rank while it is open. It leaves no hook behind, even after an error.

    `criteria`: one pass gathers all of them; Scores show the first. `axes`: the default is all of DEFAULT_AXES that the
    model has. Call `expect` with each micro-batch before it goes into a chunk. With the method "taylor" (`taylor.py`)
    gradients are watched; call `flush` after the backward pass of each micro-batch. Opening it is collective over the
    pipeline. Raises InputError for an axis that the model lacks, and for a module that no estimator claims.
    """

    def __init__(
        self,
        chunks: Iterable[nn.Module],
        architecture: Architecture,
        criteria: Sequence[str] = ("l2,mean",),
        axes: Iterable[str] | None = None,
        method: str = ACTIVATION,
    ) -> None:
        self.architecture, self.criteria, self.method = architecture, tuple(criteria), method
        self.pairs = [criterion(name) for name in dict.fromkeys(criteria)]
        self.axes = None if axes is None else tuple(axes)
        self.chunks = [unwrap(chunk) for chunk in chunks]
        self.accumulators: list[dict[str, Accumulator]] = []
        self.samples = self.tokens = 0

    def register(self) -> Iterator[RemovableHandle]:
        watched: list[Watches] = []
        refusal: str | None = None
        try:
            watched = [self._watches(chunk) for chunk in self.chunks]
        except InputError as error:
            refusal = str(error)
        check_axes(self.axes, {axis for watches in watched for axis, _, _ in watches}, self._known(), refusal)
        hook_of = self._hook if self.method == ACTIVATION else self._gradient_hook
        for chunk, watches in zip(self.chunks, watched, strict=True):
            accumulators: dict[str, Accumulator] = {}
            for estimator, watch in watches.values():
                if estimator.axis not in accumulators:
                    kind = ExpertAccumulator if estimator.experts else Accumulator
                    accumulators[estimator.axis] = kind(estimator, self.pairs, chunk.config)
                hook = hook_of(accumulators[estimator.axis], watch)
                yield watch.module.register_forward_hook(hook, with_kwargs=True)
                if watch.before and self.method == ACTIVATION:
                    yield _seen_before(*watch.before)
            self.accumulators.append(accumulators)
            if self.method == ACTIVATION:
                yield chunk.register_forward_hook(self._flush(accumulators))

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        for accumulators in self.accumulators:
            for accumulator in accumulators.values():
                accumulator.drop()

    def expect(self, batch: Mapping[str, Tensor], first: bool = True) -> None:
        super().expect(batch, first)
        if first:
            self.samples += self.in_hand.present
            self.tokens += self.in_hand.tokens

    def _known(self) -> set[str]:
        """The axes that estimators of this rank's modules could score, requested or not."""
        modules = (module for chunk in self.chunks for module, _ in with_layers(chunk.decoder))
        return {cls.axis for module in modules for _, cls in estimators_of(module)}

    def _watches(self, chunk: MegatronModule) -> Watches:
        """(axis, row, expert) -> what to watch. The estimator that was registered last wins."""
        check_claimed(chunk.decoder)
        latest: dict[tuple[str, int, int | None], tuple[int, Estimator, Watch]] = {}
        for module, layer in with_layers(chunk.decoder):
            for order, cls in estimators_of(module):
                if cls.axis not in (DEFAULT_AXES if self.axes is None else self.axes):
                    continue
                estimator = cls()
                for watch in estimator.watches(module, layer, self.architecture):
                    if self.method == TAYLOR and watch.taylor is None:
                        continue
                    key = (cls.axis, watch.row, watch.expert)
                    if key not in latest or latest[key][0] <= order:
                        latest[key] = order, estimator, watch
        return {key: (estimator, watch) for key, (_, estimator, watch) in latest.items()}

    def _hook(self, accumulator: Accumulator, watch: Watch) -> Hook:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Output) -> None:
            module_input = args[0] if args else kwargs["hidden_states"]
            values = watch.values(module, module_input.detach(), output)
            accumulator.add(watch, values, self.in_hand)

        return hook

    def _gradient_hook(self, accumulator: Accumulator, watch: Watch) -> Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Output) -> None:
            assert watch.taylor is not None
            activation, values = watch.taylor(module, args[0] if args else kwargs["hidden_states"], output)
            samples = self.in_hand
            activation.register_hook(lambda gradient: accumulator.add(watch, values(gradient), samples))

        return hook

    def _flush(self, accumulators: dict[str, Accumulator]) -> Callable[..., None]:
        @torch.no_grad()
        def flush(*_: object) -> None:
            for axis in sorted(accumulators):
                accumulators[axis].flush(self.in_hand)

        return flush

    def flush(self) -> None:
        """Takes in the micro-batch whose backward pass has ended (Taylor). Collective over the ranks that share it."""
        for accumulators in self.accumulators:
            self._flush(accumulators)()


def _seen_before(module: nn.Module, see: Callable[[Tensor], None]) -> RemovableHandle:
    """Shows `see` each input of `module`, before the module runs."""

    @torch.no_grad()
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        see((args[0] if args else kwargs["hidden_states"]).detach())

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def check_axes(requested: Sequence[str] | None, watched: set[str], known: set[str], refusal: str | None) -> None:
    """Raises InputError, on every rank, for a stage's refusal and for an axis that no stage of the pipeline has.

    `watched`: the axes that are watched on this rank. `known`: those that its modules' estimators could score.
    `refusal`: this rank's error. Collective over the pipeline.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    stages = gather_objects((watched, known, refusal), group)
    for _, _, reason in stages:
        if reason is not None:
            raise InputError(reason)
    available, legal = (set().union(*(stage[i] for stage in stages)) for i in (0, 1))
    for axis in requested or ():
        if axis not in available:
            raise InputError(f"nothing in this model is watched for '{axis}'; {nearest(axis, legal - {axis})}")


def with_layers(block: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Modules of a TransformerBlock, each with the 0-based global number of its layer (-1 for the block itself)."""
    yield block, -1
    for layer in block.layers:
        yield from ((module, layer.layer_number - 1) for module in _outside_experts(layer))


def _outside_experts(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all below it, without the inside of a mixture of experts: its layer's estimators look into it."""
    yield module
    if not isinstance(module, MoELayer):
        for child in module.children():
            yield from _outside_experts(child)
