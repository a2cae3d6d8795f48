"""What the package asks of a host: the framework that builds and trains a model."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Host(Protocol):
    """Importing one loads no framework: commands ask it before they start a process."""

    name: str
    worker: str  # the module that runs a stage: `python -m WORKER STAGE ORDER.json`

    def keep_whole(self, checkpoints: Path) -> tuple[dict[int, Path], list[str]]:
        """The newest whole checkpoint of a training by its step, the only one that stays, and a line for each damaged
        one."""
        ...
