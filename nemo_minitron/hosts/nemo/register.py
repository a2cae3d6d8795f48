"""Adds this package's estimators and connectors to NeMo's own model classes."""

from __future__ import annotations

import nemo_minitron.backend as backend


def register() -> None:
    """Registers this package with NeMo's model classes. A second call changes nothing.

    Afterwards `minitron_estimators()` of `llm.GPTModel` and its subclasses returns {Megatron module type: estimators
    that watch it}. `llm.import_ckpt(model, "minitron://TEACHER", out, plan=...)` writes a plan's student as a
    checkpoint, and `llm.export_ckpt(checkpoint, "minitron", out)` writes a Hugging Face folder.
    """
    backend.setup()
    from nemo.collections import llm

    from nemo_minitron.hosts.nemo.connectors import connect
    from nemo_minitron.importance.estimators import REGISTRY

    llm.GPTModel.minitron_estimators = staticmethod(lambda: {k: list(v) for k, v in REGISTRY.items()})
    connect(llm)
