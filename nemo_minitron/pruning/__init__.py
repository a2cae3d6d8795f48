"""PrunePlan + any tensor source -> any tensor sink. A cut moves bytes and never computes. No torch."""

from nemo_minitron.pruning.cut import prune
from nemo_minitron.pruning.selection import student_index
from nemo_minitron.pruning.write import write_weights
from nemo_minitron.sources.folder import HFSource

__all__ = ["HFSource", "prune", "student_index", "write_weights"]
