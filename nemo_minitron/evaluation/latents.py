"""transformers' attention of DeepSeek V2 with the softmax scale that the model was trained with.

YaRN of the config may have `mscale_all_dim`. DeepSeek's own code, Megatron and transformers' class of V3 multiply the
scale of the softmax by the square of what it gives. transformers' class of V2 (4.57 and 5.12) leaves it out: with the
numbers of V2-Lite (factor 40, 0.707) its scores are 1 / 1.59 of what they should be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.artifacts.json_types import HfConfig
from nemo_minitron.families.bridge import attention_of
from nemo_minitron.families.translate import rope_of

if TYPE_CHECKING:
    from torch import nn

LACKING = ("DeepseekV2Attention",)


def mend(model: nn.Module, config: HfConfig) -> None:
    """Multiplies the scale of each such layer of a transformers model, once. `config`: normalized."""
    kind, rope = rope_of(config)
    if kind != "yarn" or not rope.get("mscale_all_dim"):
        return
    for module in model.modules():
        if type(module).__name__ in LACKING:
            module.scaling = (module.qk_head_dim**-0.5) * attention_of(rope["factor"], rope["mscale_all_dim"]) ** 2
