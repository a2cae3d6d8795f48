"""The import path for a user of Megatron-Bridge: callbacks and `setup`. A name loads Bridge when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.lazy import loader

if TYPE_CHECKING:
    from nemo_minitron.hosts.bridge.callbacks import Importance, Pruning
    from nemo_minitron.hosts.bridge.distill import Distillation
    from nemo_minitron.hosts.bridge.load import setup

__getattr__ = loader(
    __name__,
    {
        "Distillation": "nemo_minitron.hosts.bridge.distill", "Importance": "nemo_minitron.hosts.bridge.callbacks",
        "Pruning": "nemo_minitron.hosts.bridge.callbacks", "setup": "nemo_minitron.hosts.bridge.load",
    },
)  # fmt: skip

__all__ = ["Distillation", "Importance", "Pruning", "setup"]
