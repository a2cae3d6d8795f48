"""What a model loses without some of its layers: the depth criteria beside block influence (MINITRON, section 1).

`depth_scan`: LM loss or perplexity without each layer or contiguous block; `multiple_choice`: accuracy of a
downstream task likewise; `iterative_removal`: layers taken out one by one, by the error of the logits.
All of them run a live Megatron model, in any of its layouts, by the boundary states of `Stages`.
"""

from nemo_minitron.importance.depth.choices import Accuracy, Item, multiple_choice, read_items
from nemo_minitron.importance.depth.removal import Removal, iterative_removal
from nemo_minitron.importance.depth.scan import depth_scan

__all__ = ["Accuracy", "Item", "Removal", "depth_scan", "iterative_removal", "multiple_choice", "read_items"]
