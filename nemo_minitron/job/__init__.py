"""A recipe's value (Job), the order of the stages, and the processes that run them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_minitron.job.cutting import Cutting
    from nemo_minitron.job.generation import Generation
    from nemo_minitron.job.layout import Layout
    from nemo_minitron.job.recipe import Calibration, Data, Distillation, Evaluation, Job
    from nemo_minitron.job.search import Search
    from nemo_minitron.job.step import Step

__all__ = [
    "Calibration", "Cutting", "Data", "Distillation", "Evaluation", "Generation", "Job", "Layout", "Search", "Step",
]  # fmt: skip

_WHERE = {
    "Calibration": "recipe", "Cutting": "cutting", "Data": "recipe", "Distillation": "recipe", "Evaluation": "recipe",
    "Generation": "generation", "Job": "recipe", "Layout": "layout", "Search": "search", "Step": "step",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Loaded when asked for: a command of one stage starts without the recipes of all."""
    if name not in _WHERE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
