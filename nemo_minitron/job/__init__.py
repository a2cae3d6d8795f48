"""A recipe's value (Job), the order of the stages, and the processes that run them."""

from nemo_minitron.job.cutting import Cutting
from nemo_minitron.job.generation import Generation
from nemo_minitron.job.layout import Layout
from nemo_minitron.job.recipe import Calibration, Data, Distillation, Evaluation, Job
from nemo_minitron.job.search import Search
from nemo_minitron.job.step import Step

__all__ = [
    "Calibration", "Cutting", "Data", "Distillation", "Evaluation", "Generation", "Job", "Layout", "Search", "Step",
]  # fmt: skip
