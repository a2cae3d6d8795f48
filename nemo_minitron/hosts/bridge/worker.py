"""A process of a stage: `python -m nemo_minitron.hosts.bridge.worker STAGE ORDER.json`, by torchrun or alone."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from nemo_minitron.hosts.worker import main


def _stages() -> dict[str, Callable[[Any], None]]:
    """Loads Bridge. `hosts.worker.main` says what it returns. The garbage collector is off meanwhile."""
    gc.disable()
    from nemo_minitron.hosts.bridge.load import load_bridge

    load_bridge()
    from nemo_minitron.hosts.bridge.host import BRIDGE
    from nemo_minitron.hosts.worker import loaded

    found = loaded(BRIDGE)
    gc.freeze()
    gc.enable()
    return found


if __name__ == "__main__":
    main(_stages)
