"""What passes between rooms, as files: Scores, PrunePlan, Compensation, the run's manifest. No torch and no model.

Each is loaded when it is asked for: numpy would double the time until a command shows its help.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_minitron.artifacts.compensation import Compensation
    from nemo_minitron.artifacts.composition import compose
    from nemo_minitron.artifacts.manifest import Manifest
    from nemo_minitron.artifacts.plan import PrunePlan
    from nemo_minitron.artifacts.scores import Scores

__all__ = ["Compensation", "Manifest", "PrunePlan", "Scores", "compose"]

_WHERE = {
    "Compensation": "compensation",
    "Manifest": "manifest",
    "PrunePlan": "plan",
    "Scores": "scores",
    "compose": "composition",
}


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
