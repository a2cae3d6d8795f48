"""The estimate stage on Bridge: passes of Megatron's own schedule gather the statistics."""

from __future__ import annotations

from nemo_minitron.hosts.bridge.models import build_model
from nemo_minitron.megatron.depth import DepthCriteria
from nemo_minitron.megatron.estimate import Estimation
from nemo_minitron.megatron.load import load


def validate(estimation: Estimation, depth: DepthCriteria) -> None:
    """Scores the rows that are left, and runs `depth` afterwards. As `hosts.protocol.Host.validate`."""
    chunks = load(
        estimation.source, build=build_model, precision=estimation.calibration.precision, layout=estimation.layout
    )
    estimation.score(chunks)
    depth.run(chunks)
