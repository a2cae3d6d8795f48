"""What passes between rooms, as files: Scores, PrunePlan, Compensation, the run's manifest. No torch and no model."""

from nemo_minitron.artifacts.compensation import Compensation
from nemo_minitron.artifacts.composition import compose
from nemo_minitron.artifacts.manifest import Manifest
from nemo_minitron.artifacts.plan import PrunePlan
from nemo_minitron.artifacts.scores import Scores

__all__ = ["Compensation", "Manifest", "PrunePlan", "Scores", "compose"]
