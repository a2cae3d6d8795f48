"""Which activation of which Megatron module says what matters: a registry that users can add to.

Activations in Megatron are [S, B, C]: sequence, batch, channels; C is this tensor-parallel rank's share where
the estimator is `sharded`; otherwise all ranks hold all channels, and S is a share of the sequence under
sequence parallelism. Hooks see values; they never change them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from nemo_minitron.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Watch:
    """One place to look at: `row` of the axis's scores, and a module's input or output.

    `values(module, input, output)` gives [S, B, C] from the hooked module's first input and its output.
    Of a mixture of experts: `expert` is the local one it belongs to (None: it shows them all, one after another),
    `routes` the layer's token dispatcher. `taylor(module, input, output)` gives the activation whose gradient is
    wanted, as it stands in the graph, and what makes [S, B, C] of that gradient (None: no Taylor score).
    """

    row: int
    module: nn.Module
    values: Callable[[nn.Module, Tensor, Any], Tensor]
    taylor: Callable[[nn.Module, Tensor, Any], tuple[Tensor, Callable[[Tensor], Tensor]]] | None = None
    expert: int | None = None
    routes: Any = None


class Estimator:
    """Scores one axis from one type of Megatron module; register it with `@estimator(ModuleType)`.

    `axis` names the tensor of Scores. `sharded`: channels are split over tensor-parallel ranks; else every rank
    has them all, and under sequence parallelism a part of the sequence. `aggregate=False` keeps a plain mean over
    all tokens instead of the criterion (block influence). `heads_are_positions`: values are [S * heads, B, C],
    heads split over tensor-parallel ranks. `experts`: rows have one more dimension, the experts.
    """

    axis: ClassVar[str]
    sharded: ClassVar[bool] = True
    aggregate: ClassVar[bool] = True
    heads_are_positions: ClassVar[bool] = False
    experts: ClassVar[bool] = False

    def watch(self, module: Any, layer: int, architecture: Architecture) -> Watch | None:
        """Where to look in `module`, which lies in the 0-based global `layer`; None to skip it."""
        raise NotImplementedError

    def watches(self, module: Any, layer: int, architecture: Architecture) -> Iterator[Watch]:
        """All places, where one module has several; by default the one of `watch`."""
        found = self.watch(module, layer, architecture)
        if found is not None:
            yield found


REGISTRY: dict[type, list[type[Estimator]]] = {}
_ORDER: dict[type[Estimator], int] = {}


def estimator(module_type: type) -> Callable[[type[Estimator]], type[Estimator]]:
    """Registers an Estimator for a Megatron module type and its subclasses; of a row's, the last one wins."""

    def add(cls: type[Estimator]) -> type[Estimator]:
        kept = [other for other in REGISTRY.get(module_type, []) if other.__qualname__ != cls.__qualname__]
        REGISTRY[module_type] = [*kept, cls]
        _ORDER[cls] = 1 + max(_ORDER.values(), default=0)
        return cls

    return add


def estimators_of(module: nn.Module) -> list[tuple[int, type[Estimator]]]:
    """What watches this module, by its type, with the order of registration."""
    return [(_ORDER[cls], cls) for kind, found in REGISTRY.items() if isinstance(module, kind) for cls in found]
