"""The processes of a stage: `python -m nemo_minitron.hosts.nemo.worker STAGE ORDER.json`, under torchrun or alone.

Nothing heavy is imported at module level: saving a checkpoint starts a helper that imports this module again.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Runs one stage; a refusal is left as a file for the process that launched this one, exit code 2."""
    stage, file = sys.argv[1:3]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun, which ignores it, sends it to end this process
    if "MINITRON_LIFELINE" in os.environ:
        threading.Thread(target=_hold_the_lifeline, daemon=True).start()
    faulthandler.register(signal.SIGUSR1)  # the launcher of a stage that has stalled asks where all threads are
    from nemo_minitron.errors import DivergedError, InputError
    from nemo_minitron.hosts.nemo.beat import begin
    from nemo_minitron.settings.orders import Order, read_order

    if "MINITRON_LIFELINE" in os.environ:
        begin()

    order: Order | None = None
    try:
        order = read_order(stage, file)
        _stages()[stage](order)
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
        from nemo_minitron.hosts.nemo.failure import words

        _tell(words(error, order.place if order else ""))
        raise


def _tell(error: str) -> None:
    """The launcher what ended this rank."""
    from nemo_minitron.launch.output import tell

    tell(rank=int(os.environ.get("RANK", "0")), error=error)


def _stages() -> dict[str, Callable[[Any], None]]:
    """Loaded without the garbage collector: NeMo brings a million objects that stay, and looking through them again
    and again takes a seventh of the time."""
    gc.disable()
    import nemo_minitron.backend as backend

    backend.setup()  # first: a Transformer Engine that cannot run ends Megatron's import
    from nemo_minitron.hosts.nemo import beat, finetune, stages, validate  # noqa: F401 (loaded before `gc.freeze`)
    from nemo_minitron.hosts.nemo.host import NEMO
    from nemo_minitron.megatron import cache, compensate, estimate, prune

    beat.count_layers()
    gc.freeze()
    gc.enable()
    return {
        "estimate": lambda order: estimate.estimate(order, NEMO),
        "prune": lambda order: prune.prune(order, NEMO),
        "compensate": lambda order: compensate.compensate(order, NEMO),
        "cache": lambda order: cache.cache_logits(order, NEMO),
        "distill": NEMO.train,
        "finetune": NEMO.finetune,
    }


def _hold_the_lifeline() -> None:
    """Standard input is a pipe of the process that launched this one: a byte asks to save and to end, and it closes
    when that process ends, however it ends."""
    from nemo_minitron.megatron.shutdown import ASKED

    while os.read(0, 1):
        ASKED.set()
    _leave(1)


def _leave(code: int) -> None:
    """At once: no clean-up that could wait for other ranks; the helper of saved checkpoints would stay for ever."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


if __name__ == "__main__":
    main()
