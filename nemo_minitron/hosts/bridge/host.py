"""Megatron-Bridge as a host (`hosts.protocol`). Each method loads Bridge when it is called, because commands import
this file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.artifacts.run_folder import TrainingFolder

if TYPE_CHECKING:
    from nemo_minitron.artifacts import PrunePlan
    from nemo_minitron.megatron.depth import DepthCriteria
    from nemo_minitron.megatron.estimate import Estimation
    from nemo_minitron.settings.layout import Layout
    from nemo_minitron.settings.orders import DistillOrder, FinetuneOrder


class Bridge:
    """`hosts.protocol.Host` says what each method gets, returns and raises."""

    name = "bridge"
    worker = "nemo_minitron.hosts.bridge.worker"
    checkpoints = TrainingFolder.bridge

    def keep_whole(self, checkpoints: Path) -> tuple[dict[int, Path], list[str]]:
        from nemo_minitron.hosts.bridge.saved import keep_whole

        return keep_whole(checkpoints)

    def build(self, config: Mapping[str, Any], *, precision: str, layout: Layout) -> list[Any]:
        from nemo_minitron.hosts.bridge.models import build_model

        return build_model(config, precision=precision, layout=layout)

    def save(self, chunks: list[Any], folder: Path, teacher: Path, plan: PrunePlan) -> None:
        _load()
        from nemo_minitron.hosts.bridge.students import save_chunks
        from nemo_minitron.sources.open import open_source

        save_chunks(chunks, folder, plan.target.vocab_size, open_source(teacher).folder)

    def rows(self, estimation: Estimation, first: int, samples: int, length: int) -> Sequence[dict[str, Any]]:
        from nemo_minitron.hosts.bridge.rows import rows

        return rows(estimation, first, samples, length)

    def validate(self, estimation: Estimation, depth: DepthCriteria) -> None:
        from nemo_minitron.hosts.bridge.validate import validate

        validate(estimation, depth)

    def train(self, order: DistillOrder) -> None:
        _load()
        from nemo_minitron.hosts.bridge.stages import distill

        distill(order)

    def finetune(self, order: FinetuneOrder) -> None:
        _load()
        from nemo_minitron.hosts.bridge.finetune import finetune

        finetune(order)


def _load() -> None:
    """Loads Bridge's training, before anything else imports Megatron."""
    from nemo_minitron.hosts.bridge.load import load_training

    load_training()


BRIDGE = Bridge()
