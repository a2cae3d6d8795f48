"""Scores + sizes to keep -> PrunePlan. No torch."""

from nemo_minitron.search.compare import compare_plans, threshold_band
from nemo_minitron.search.plans import plan, random_plan

__all__ = ["compare_plans", "plan", "random_plan", "threshold_band"]
