"""The processes of a stage: `python -m nemo_minitron.nemo.worker STAGE SETTINGS.json`, under torchrun or alone.

Nothing heavy is imported at module level: saving a checkpoint starts a helper that imports this module again.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path


def main() -> None:
    """Runs one stage; a refusal is left as a file for the process that launched this one, exit code 2."""
    stage, file = sys.argv[1:3]
    if "MINITRON_LIFELINE" in os.environ:
        threading.Thread(target=_leave_with_the_launcher, daemon=True).start()
    settings = json.loads(Path(file).read_text())
    from nemo_minitron.errors import InputError

    try:
        from nemo_minitron.nemo import cache, compensate, estimate, prune, stages

        run = {"estimate": estimate.estimate, "distill": stages.distill, "prune": prune.prune}
        (run | {"compensate": compensate.compensate, "cache": cache.cache_logits})[stage](settings)
    except InputError as error:
        folder = os.environ.get("MINITRON_ERRORS")
        if folder:
            Path(folder, f"refused-{os.environ.get('RANK', '0')}").write_text(str(error))
        print(f"minitron: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # no clean-up that could wait for other ranks: torchrun ends them


def _leave_with_the_launcher() -> None:
    """Standard input is a pipe that closes when the process that launched this one ends, however it ends."""
    while os.read(0, 1):
        continue
    os._exit(1)


if __name__ == "__main__":
    main()
