"""What passes between rooms, as files: Scores, PrunePlan, the run's manifest. No torch, no model library."""

from nemo_minitron.artifacts.manifest import Manifest
from nemo_minitron.artifacts.plan import PrunePlan
from nemo_minitron.artifacts.scores import Scores

__all__ = ["Manifest", "PrunePlan", "Scores"]
