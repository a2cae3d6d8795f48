"""The import path for a user of Megatron-Bridge: callbacks and `setup`. A name loads Bridge when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_minitron.lazy import loader

if TYPE_CHECKING:
    from nemo_minitron.hosts.bridge.callbacks import Importance, Pruning
    from nemo_minitron.hosts.bridge.distill import Distillation
    from nemo_minitron.hosts.bridge.load import setup

_load = loader(
    __name__,
    {
        "Distillation": "nemo_minitron.hosts.bridge.distill", "Importance": "nemo_minitron.hosts.bridge.callbacks",
        "Pruning": "nemo_minitron.hosts.bridge.callbacks", "setup": "nemo_minitron.hosts.bridge.load",
    },
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """A name of this package. Bridge is loaded before the callbacks, which inherit from its own."""
    if name in __all__ and name != "setup":
        _load("setup")()
    return _load(name)


__all__ = ["Distillation", "Importance", "Pruning", "setup"]
