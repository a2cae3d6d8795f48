"""The import path for a user of NeMo: callbacks, models and connectors. A name loads NeMo when it is first used."""

from __future__ import annotations

from typing import Any

_MODULES = {
    "Importance": "nemo_minitron.hosts.nemo.callbacks",
    "Pruning": "nemo_minitron.hosts.nemo.callbacks",
    "Distillation": "nemo_minitron.hosts.nemo.distill",
    "register": "nemo_minitron.hosts.nemo.register",
    "load_model": "nemo_minitron.hosts.nemo.models",
}

__all__ = ["Distillation", "Importance", "Pruning", "load_model", "register"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
