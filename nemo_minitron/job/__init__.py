"""The whole job: its stages in order, its run folder, chains of jobs, the dry run. `settings` has a recipe's values."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_minitron.settings.calibration import Calibration
    from nemo_minitron.settings.cutting import Cutting
    from nemo_minitron.settings.distillation import Distillation
    from nemo_minitron.settings.generation import Generation
    from nemo_minitron.settings.layout import Layout
    from nemo_minitron.settings.recipe import Data, Evaluation, Job
    from nemo_minitron.settings.search import Search
    from nemo_minitron.settings.step import Step

__all__ = [
    "Calibration", "Cutting", "Data", "Distillation", "Evaluation", "Generation", "Job", "Layout", "Search", "Step",
]  # fmt: skip

_WHERE = {name: name.lower() for name in __all__} | {"Data": "recipe", "Evaluation": "recipe", "Job": "recipe"}


def __getattr__(name: str) -> object:
    """Settings are imported when they are used, so that a command of one stage starts without those of all stages."""
    if name not in _WHERE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"nemo_minitron.settings.{_WHERE[name]}"), name)
