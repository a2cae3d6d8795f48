"""A process of a stage: `python -m nemo_minitron.hosts.nemo.worker STAGE ORDER.json`, started by torchrun or alone.

Nothing heavy is imported at module level, because saving a checkpoint starts a helper that imports this module again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from nemo_minitron.hosts.worker import main


def _stages() -> dict[str, Callable[[Any], None]]:
    """Loads NeMo. `hosts.worker.main` says what it returns.

    The garbage collector is off meanwhile: NeMo brings a million objects that stay, and to search them again and again
    takes a seventh of the time.
    """
    gc.disable()
    import nemo_minitron.backend as backend

    backend.setup()  # it comes first, because a Transformer Engine that cannot run makes Megatron's import fail
    from nemo_minitron.hosts.nemo import finetune, stages, validate  # noqa: F401 (loaded before `gc.freeze`)
    from nemo_minitron.hosts.nemo.host import NEMO
    from nemo_minitron.hosts.worker import loaded

    found = loaded(NEMO)
    gc.freeze()
    gc.enable()
    return found


if __name__ == "__main__":
    main(_stages)
