"""What NeMo sees: callbacks, model building, live and sharded checkpoints, data. Loads NeMo on first use."""

from __future__ import annotations

from typing import Any

_WHERE = {
    "Importance": "nemo_minitron.hosts.nemo.callbacks",
    "Pruning": "nemo_minitron.hosts.nemo.callbacks",
    "Distillation": "nemo_minitron.hosts.nemo.distill",
    "register": "nemo_minitron.hosts.nemo.register",
    "load_model": "nemo_minitron.hosts.nemo.models",
}

__all__ = ["Distillation", "Importance", "Pruning", "load_model", "register"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
