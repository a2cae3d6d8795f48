"""PrunePlan + any tensor source -> any tensor sink. A cut moves bytes and never computes (but for two
tensors of a Gemma: `rescale.py`). No torch.

Each is loaded when it is asked for, since a command that shows its help needs none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.lazy import loader

if TYPE_CHECKING:
    from nemo_minitron.pruning.cut import prune
    from nemo_minitron.pruning.selection import student_index
    from nemo_minitron.pruning.write import write_weights
    from nemo_minitron.sources.folder import HFSource

__all__ = ["HFSource", "prune", "student_index", "write_weights"]

__getattr__ = loader(
    __name__,
    {
        "HFSource": "nemo_minitron.sources.folder", "prune": ".cut", "student_index": ".selection",
        "write_weights": ".write",
    },
)  # fmt: skip
