"""What this package adds to NeMo's own model classes."""

from __future__ import annotations

import nemo_minitron.backend as backend


def register() -> None:
    """Teaches NeMo's model classes what this package adds; explicit and idempotent.

    Afterwards `llm.GPTModel` and its subclasses answer `minitron_estimators()`: which estimator watches
    which Megatron module type; and `llm.import_ckpt(model, "minitron://TEACHER", out, plan=...)` reads a teacher
    through a plan, `llm.export_ckpt(checkpoint, "minitron", out)` writes a Hugging Face folder.
    """
    backend.setup()
    from nemo.collections import llm

    from nemo_minitron.hosts.nemo.connectors import connect
    from nemo_minitron.importance.estimators import REGISTRY

    llm.GPTModel.minitron_estimators = staticmethod(lambda: {k: list(v) for k, v in REGISTRY.items()})
    connect(llm)
