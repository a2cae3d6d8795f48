"""NeMo 2 as a host (`hosts.protocol`). Each method loads NeMo when it is called, because commands import this file."""

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


class NeMo:
    """`hosts.protocol.Host` says what each method gets, returns and raises."""

    name = "nemo"
    worker = "nemo_minitron.hosts.nemo.worker"
    checkpoints = TrainingFolder.nemo

    def keep_whole(self, checkpoints: Path) -> tuple[dict[int, Path], list[str]]:
        from nemo_minitron.hosts.nemo.saved import keep_whole

        return keep_whole(checkpoints)

    def build(self, config: Mapping[str, Any], *, precision: str, layout: Layout) -> list[Any]:
        from nemo_minitron.hosts.nemo.models import build_model

        return build_model(config, precision=precision, layout=layout)

    def save(self, chunks: list[Any], folder: Path, teacher: Path, plan: PrunePlan) -> None:
        from nemo_minitron.hosts.nemo.students import save_like, save_new
        from nemo_minitron.sources.bridge_config import is_bridge_checkpoint

        (save_new if is_bridge_checkpoint(teacher) else save_like)(teacher, chunks, folder, plan)

    def rows(self, estimation: Estimation, first: int, samples: int, length: int) -> Sequence[dict[str, Any]]:
        from nemo_minitron.hosts.nemo.validate import rows

        return rows(estimation, first, samples, length)

    def validate(self, estimation: Estimation, depth: DepthCriteria) -> None:
        from nemo_minitron.hosts.nemo.validate import validate

        validate(estimation, depth)

    def train(self, order: DistillOrder) -> None:
        from nemo_minitron.hosts.nemo.stages import distill

        distill(order)

    def finetune(self, order: FinetuneOrder) -> None:
        from nemo_minitron.hosts.nemo.finetune import finetune

        finetune(order)


NEMO = NeMo()
