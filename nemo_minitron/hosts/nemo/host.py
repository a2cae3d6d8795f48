"""NeMo 2 as a host; it is loaded when it is asked for something."""

from __future__ import annotations

from pathlib import Path


class NeMo:
    name = "NeMo"
    worker = "nemo_minitron.hosts.nemo.worker"

    def keep_whole(self, checkpoints: Path) -> tuple[dict[int, Path], list[str]]:
        from nemo_minitron.hosts.nemo.saved import keep_whole

        return keep_whole(checkpoints)


NEMO = NeMo()
