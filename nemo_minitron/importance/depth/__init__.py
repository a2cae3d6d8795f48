"""What a model loses without some of its layers: the depth criteria beside block influence (docs/method.md).

`depth_scan`: the language-model loss or perplexity without each layer or contiguous block. `multiple_choice`: the
accuracy of a downstream task without each of them. `iterative_removal`: layers are removed one by one, by the error of
the logits. All of them run a live Megatron model, in any of its layouts, from the states that `Stages` keeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.lazy import loader

if TYPE_CHECKING:
    from nemo_minitron.importance.depth.choices import Accuracy, multiple_choice
    from nemo_minitron.importance.depth.items import Item, read_items
    from nemo_minitron.importance.depth.removal import Removal, iterative_removal
    from nemo_minitron.importance.depth.scan import depth_scan

__all__ = ["Accuracy", "Item", "Removal", "depth_scan", "iterative_removal", "multiple_choice", "read_items"]

__getattr__ = loader(
    __name__,
    {
        "Accuracy": ".choices", "Item": ".items", "Removal": ".removal", "depth_scan": ".scan",
        "iterative_removal": ".removal", "multiple_choice": ".choices", "read_items": ".items",
    },
)  # fmt: skip
