"""PrunePlan + any tensor source -> any tensor sink. A cut moves bytes and never computes. No torch.

Each is loaded when it is asked for, since a command that shows its help needs none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_minitron.pruning.cut import prune
    from nemo_minitron.pruning.selection import student_index
    from nemo_minitron.pruning.write import write_weights
    from nemo_minitron.sources.folder import HFSource

__all__ = ["HFSource", "prune", "student_index", "write_weights"]

_WHERE = {
    "HFSource": "nemo_minitron.sources.folder",
    "prune": "nemo_minitron.pruning.cut",
    "student_index": "nemo_minitron.pruning.selection",
    "write_weights": "nemo_minitron.pruning.write",
}


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
