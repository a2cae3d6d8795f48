"""What the worker of every host does: it reads an order, runs its stage, and tells the launcher how it went.

Nothing heavy is imported at module level, because saving a checkpoint starts a helper that imports these modules again.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(stages: Callable[[], dict[str, Callable[[Any], None]]]) -> None:
    """Runs one stage. The exit code is 2 for a refusal, whose sentence is written to a file for the launcher.

    `stages` loads the host and returns stage -> the function that runs its order.
    """
    stage, file = sys.argv[1:3]
    # torchrun ignores SIGTERM here, and this process inherits that; but torchrun sends it to end this process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if "MINITRON_LIFELINE" in os.environ:
        threading.Thread(target=_watch_lifeline, daemon=True).start()
    faulthandler.register(signal.SIGUSR1)  # the launcher asks for the stacks of all threads of a stalled stage
    from nemo_minitron.errors import DivergedError, InputError
    from nemo_minitron.hosts.beat import begin
    from nemo_minitron.settings.orders import Order, read_order

    if "MINITRON_LIFELINE" in os.environ:
        begin()

    order: Order | None = None
    try:
        order = read_order(stage, file)
        stages()[stage](order)
    except InputError as error:
        folder = os.environ.get("MINITRON_ERRORS")
        if folder:
            Path(folder, f"refused-{os.environ.get('RANK', '0')}").write_text(str(error))
        print(f"minitron: {error}", file=sys.stderr, flush=True)
        _leave(2)
    except DivergedError as error:
        _tell(f"{DivergedError.__name__}: {error}")
        _leave(1)
    except Exception as error:
        from nemo_minitron.hosts.failure import words

        _tell(words(error, order.place if order else ""))
        raise


def _tell(error: str) -> None:
    """Tells the launcher what ended this rank."""
    from nemo_minitron.settings.progress import tell

    tell(rank=int(os.environ.get("RANK", "0")), error=error)


def _watch_lifeline() -> None:
    """Reads standard input, a pipe from the process that launched this one. A byte asks to save and to end. The pipe
    closes when that process ends, in whatever way; this one must then end too."""
    from nemo_minitron.megatron.shutdown import ASKED

    while os.read(0, 1):
        ASKED.set()
    _leave(1)


def _leave(code: int) -> None:
    """Ends this process at once, without a clean-up that could wait for other ranks. The helper that saves checkpoints
    is killed, because it would stay for ever."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def loaded(host: Any) -> dict[str, Callable[[Any], None]]:
    """Stage -> the function that runs its order. Megatron must be importable: `backend.setup()` has run."""
    from nemo_minitron.hosts import beat
    from nemo_minitron.megatron import cache, compensate, estimate, prune, rotate

    beat.count_layers()
    return {
        "estimate": lambda order: estimate.estimate(order, host),
        "prune": lambda order: prune.prune(order, host),
        "compensate": lambda order: compensate.compensate(order, host),
        "rotate": lambda order: rotate.rotate(order, host),
        "cache": lambda order: cache.cache_logits(order, host),
        "distill": host.train,
        "finetune": host.finetune,
    }
