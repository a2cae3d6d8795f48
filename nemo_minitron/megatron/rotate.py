"""The rotate stage: the second moments of the uncut model's residual stream, over the rows of a calibration.

Shapes (docs/shapes.md): H hidden channels.
"""

from __future__ import annotations

import numpy as np
import torch

from nemo_minitron.artifacts.files import atomic_file
from nemo_minitron.importance.stream import stream_covariance
from nemo_minitron.megatron.compensate import rank_batches, reporting
from nemo_minitron.megatron.load import Builder, load
from nemo_minitron.megatron.progress import Report, counted
from nemo_minitron.settings.orders import RotateOrder
from nemo_minitron.sources.open import open_source


def rotate(order: RotateOrder, host: Builder) -> None:
    """Writes the stream's covariance, fp64 [hidden, hidden], to `order.out`. Collective.

    Raises InputError if the model or the text cannot be read.
    """
    source, calibration = open_source(order.model), order.calibration
    chunks = load(source, build=host.build, precision=calibration.precision, layout=order.layout)
    report = Report("rotation: row", scale=calibration.sequence_length)
    with counted(chunks[0], reporting(order, report)):
        covariance_HH = stream_covariance(chunks, rank_batches(order), source.architecture)
    if torch.distributed.get_rank() == 0:
        with atomic_file(order.out) as temporary, open(temporary, "wb") as file:
            np.save(file, covariance_HH.cpu().numpy())
    torch.distributed.barrier()
