"""What passes between rooms, as files: Scores, PrunePlan, Compensation, the run's manifest. No torch and no model.

Each is loaded when it is asked for: numpy would double the time until a command shows its help.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.lazy import loader

if TYPE_CHECKING:
    from nemo_minitron.artifacts.compensation import Compensation
    from nemo_minitron.artifacts.composition import compose
    from nemo_minitron.artifacts.manifest import Manifest
    from nemo_minitron.artifacts.plan import PrunePlan
    from nemo_minitron.artifacts.scores import Scores

__all__ = ["Compensation", "Manifest", "PrunePlan", "Scores", "compose"]

__getattr__ = loader(
    __name__,
    {
        "Compensation": ".compensation", "Manifest": ".manifest", "PrunePlan": ".plan", "Scores": ".scores",
        "compose": ".composition",
    },
)  # fmt: skip
