"""Which activation of which Megatron module gives which score: a registry that users can add to.

Activations in Megatron are [S, B, C]: sequence, batch, channels. If the estimator is `sharded`, C is this
tensor-parallel rank's share of the channels. Otherwise all ranks have all channels, and under sequence parallelism S is
a share of the sequence. Hooks read values and never change them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar, Union

from torch import Tensor, nn

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

Output = Union[Tensor, tuple]  # of a Megatron module: a tensor, or a tensor and its bias (None if it has none)


@dataclasses.dataclass(frozen=True)
class Watch:
    """One activation to watch: a module's input or output, and the `row` of the axis's scores that it belongs to.

    `values(module, input, output)` gives [S, B, C] from the hooked module's first input and its output. In a mixture of
    experts `expert` is the local expert that the module belongs to (None: the module has all of them, one after
    another), and `routes` is the layer's token dispatcher. `taylor(module, input, output)` gives the activation whose
    gradient is needed, as it stands in the graph, and a function that makes [S, B, C] of that gradient (None: no Taylor
    score). `before`: a module around the hooked one, and a function that is given its input first, if `values` needs
    what that input says.
    """

    row: int
    module: nn.Module
    values: Callable[[nn.Module, Tensor, Output], Tensor]
    taylor: Callable[[nn.Module, Tensor, Output], tuple[Tensor, Callable[[Tensor], Tensor]]] | None = None
    expert: int | None = None
    routes: MoETokenDispatcher | None = None
    before: tuple[nn.Module, Callable[[Tensor], None]] | None = None


class Estimator:
    """Scores one axis from one type of Megatron module. Register it with `@estimator(ModuleType)`.

    `axis` names the tensor of Scores. `sharded`: channels are split over tensor-parallel ranks. Otherwise every rank
    has all channels and, under sequence parallelism, a part of the sequence. `aggregate=False` takes a plain mean over
    all tokens instead of the criterion (block influence). `heads_are_positions`: values are [S * heads, B, C], and the
    heads are split over tensor-parallel ranks. `experts`: rows have one more dimension, the experts.
    """

    axis: ClassVar[str]
    sharded: ClassVar[bool] = True
    aggregate: ClassVar[bool] = True
    heads_are_positions: ClassVar[bool] = False
    experts: ClassVar[bool] = False

    def watch(self, module: nn.Module, layer: int, architecture: Architecture) -> Watch | None:
        """What to watch in `module`, which is in the 0-based global `layer`. None skips the module."""
        raise NotImplementedError

    def watches(self, module: nn.Module, layer: int, architecture: Architecture) -> Iterator[Watch]:
        """All that is to be watched in `module`. The default is what `watch` gives; override it for several."""
        watch = self.watch(module, layer, architecture)
        if watch is not None:
            yield watch


REGISTRY: dict[type, list[type[Estimator]]] = {}
_ORDER: dict[type[Estimator], int] = {}


def estimator(module_type: type) -> Callable[[type[Estimator]], type[Estimator]]:
    """Registers an Estimator for a Megatron module type and its subclasses. If two give the same row, the last wins."""

    def add(cls: type[Estimator]) -> type[Estimator]:
        kept = [other for other in REGISTRY.get(module_type, []) if other.__qualname__ != cls.__qualname__]
        REGISTRY[module_type] = [*kept, cls]
        _ORDER[cls] = 1 + max(_ORDER.values(), default=0)
        return cls

    return add


def estimators_of(module: nn.Module) -> list[tuple[int, type[Estimator]]]:
    """The estimators of this module's type, each with its number in the order of registration."""
    matching = [classes for module_type, classes in REGISTRY.items() if isinstance(module, module_type)]
    return [(_ORDER[cls], cls) for classes in matching for cls in classes]


def check_claimed(block: nn.Module) -> None:
    """Raises InputError for a part of a model's block of layers that no estimator claims: its scores would be zeros.

    Each layer's type, the block's own norms, and each module in a layer that holds a matrix need an estimator of their
    type. A module that has one answers for everything inside.
    """
    outside = any(True for name, child in block.named_children() if name != "layers" for _ in child.parameters())
    if outside and not estimators_of(block):
        raise InputError(_unclaimed(block, "the block of layers"))
    for layer in block.layers:
        place = f"layer {layer.layer_number - 1}"
        parts = [part for child in layer.children() for part in _without_estimators(child, child)]
        for part in [*([] if estimators_of(layer) else [layer]), *parts]:
            raise InputError(_unclaimed(part, place))


def _without_estimators(module: nn.Module, part: nn.Module) -> Iterator[nn.Module]:
    """`part`, a child of a layer, if a matrix lies in `module` that no module above it claims."""
    if estimators_of(module):
        return
    if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
        yield part
    for child in module.children():
        yield from _without_estimators(child, part)


def _unclaimed(module: nn.Module, place: str) -> str:
    legal = ", ".join(sorted(kind.__name__ for kind in REGISTRY))
    return (
        f"{place} has a {type(module).__name__}, which no estimator claims, so its scores would be zeros; legal are "
        f"{legal}, or register an estimator for it (docs/own-estimator.md)"
    )
