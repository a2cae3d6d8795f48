"""The import path for a user of NeMo: callbacks, models and connectors. A name loads NeMo when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.lazy import loader

if TYPE_CHECKING:
    from nemo_minitron.hosts.nemo.callbacks import Importance, Pruning
    from nemo_minitron.hosts.nemo.distill import Distillation
    from nemo_minitron.hosts.nemo.models import load_model
    from nemo_minitron.hosts.nemo.register import register

__getattr__ = loader(
    __name__,
    {
        "Distillation": "nemo_minitron.hosts.nemo.distill", "Importance": "nemo_minitron.hosts.nemo.callbacks",
        "Pruning": "nemo_minitron.hosts.nemo.callbacks", "load_model": "nemo_minitron.hosts.nemo.models",
        "register": "nemo_minitron.hosts.nemo.register",
    },
)  # fmt: skip

__all__ = ["Distillation", "Importance", "Pruning", "load_model", "register"]
