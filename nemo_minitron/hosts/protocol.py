"""What the package asks of a host: the framework that builds and trains a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.orders import DistillOrder, FinetuneOrder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemo_minitron.megatron.depth import DepthCriteria
    from nemo_minitron.megatron.estimate import Estimation


class Host(Protocol):
    """Importing one loads no framework: commands ask it before they start a process, workers inside of one.

    What a stage does with a live model is `megatron/`'s: it has `build` for that, and the hooks of a training that a
    host calls from its own loop are `megatron.distiller.Distiller`'s.
    """

    name: str
    worker: str  # the module that runs a stage: `python -m WORKER STAGE ORDER.json`

    def keep_whole(self, checkpoints: Path) -> tuple[dict[int, Path], list[str]]:
        """The newest whole checkpoint of a training by its step, the only one that stays, and a line for each damaged
        one."""
        ...

    def build(self, config: Mapping[str, Any], *, precision: str, layout: Layout) -> list[Any]:
        """As `megatron.load.Builder`."""
        ...

    def save(self, chunks: list[Any], folder: Path, teacher: Path, plan: PrunePlan) -> None:
        """As `megatron.prune.Writer`."""
        ...

    def rows(self, estimation: Estimation, first: int, samples: int, length: int) -> Sequence[dict[str, Any]]:
        """As `megatron.estimate.Runner`."""
        ...

    def validate(self, estimation: Estimation, depth: DepthCriteria) -> None:
        """As `megatron.estimate.Runner`."""
        ...

    def train(self, order: DistillOrder) -> None:
        """Trains to `out/last.json`'s checkpoint, with `out/loss.csv`; goes on where it stopped."""
        ...

    def finetune(self, order: FinetuneOrder) -> None:
        """As `train`, on prompts and answers."""
        ...
