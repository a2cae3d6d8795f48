"""The whole job: its stages in order, its run folder, chains of jobs, the dry run. `settings` has a recipe's values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.lazy import loader

if TYPE_CHECKING:
    from nemo_minitron.settings.calibration import Calibration
    from nemo_minitron.settings.cutting import Cutting
    from nemo_minitron.settings.distillation import Distillation
    from nemo_minitron.settings.gates import Gates
    from nemo_minitron.settings.generation import Generation
    from nemo_minitron.settings.layout import Layout
    from nemo_minitron.settings.recipe import Data, Evaluation, Job
    from nemo_minitron.settings.search import Search
    from nemo_minitron.settings.step import Step

__all__ = [
    "Calibration", "Cutting", "Data", "Distillation", "Evaluation", "Gates", "Generation", "Job", "Layout", "Search",
    "Step",
]  # fmt: skip

# Settings are loaded when they are used, so that a command of one stage starts without those of all stages.
_FILES = {name: name.lower() for name in __all__} | {"Data": "evaluation", "Evaluation": "evaluation", "Job": "recipe"}
__getattr__ = loader(__name__, {name: f"nemo_minitron.settings.{file}" for name, file in _FILES.items()})
