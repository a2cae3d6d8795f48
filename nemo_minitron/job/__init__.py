"""The whole job: a recipe's value (settings), its stages in order (stages), the processes that run them (processes)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_minitron.job.settings.calibration import Calibration
    from nemo_minitron.job.settings.cutting import Cutting
    from nemo_minitron.job.settings.distillation import Distillation
    from nemo_minitron.job.settings.generation import Generation
    from nemo_minitron.job.settings.layout import Layout
    from nemo_minitron.job.settings.recipe import Data, Evaluation, Job
    from nemo_minitron.job.settings.search import Search
    from nemo_minitron.job.settings.step import Step

__all__ = [
    "Calibration", "Cutting", "Data", "Distillation", "Evaluation", "Generation", "Job", "Layout", "Search", "Step",
]  # fmt: skip

_WHERE = {name: name.lower() for name in __all__} | {"Data": "recipe", "Evaluation": "recipe", "Job": "recipe"}


def __getattr__(name: str) -> Any:
    """Loaded when asked for: a command of one stage starts without the recipes of all."""
    if name not in _WHERE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.settings.{_WHERE[name]}"), name)
