"""Scores + a budget, or sizes to keep -> PrunePlan. No torch."""

from nemo_minitron.search.candidates import Candidate, SearchResult, search
from nemo_minitron.search.compare import compare_plans, threshold_band
from nemo_minitron.search.order import on_axes, ranked_order
from nemo_minitron.search.plans import first_plan, plan, random_plan
from nemo_minitron.search.rank import Ranking, rank
from nemo_minitron.search.space import Divisors, Space, make_space
from nemo_minitron.search.targets import Target

__all__ = [
    "Candidate", "Divisors", "Ranking", "SearchResult", "Space", "Target", "compare_plans", "first_plan", "make_space",
    "on_axes", "plan", "random_plan", "rank", "ranked_order", "search", "threshold_band",
]  # fmt: skip
