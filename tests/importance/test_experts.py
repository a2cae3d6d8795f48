"""Which tokens an expert saw, where one process of a CPU cannot show it; layouts are in test_layouts_kinds.py."""

import pytest
import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from nemo_minitron.importance.estimators import REGISTRY
from nemo_minitron.importance.experts import by_expert


@pytest.mark.parametrize("align", [16, 32])
def test_padding_for_fp8_is_left_out(align):
    """TEGroupedMLP pads each expert's tokens, one expert after another; its output comes unpadded."""
    sizes = [5, 0, 32, 33]
    parts = [torch.full((size, 3), float(k)) for k, size in enumerate(sizes)]
    padded = [torch.nn.functional.pad(part, (0, 0, 0, -len(part) % align), value=9.0) for part in parts]
    for given in (torch.cat(padded), torch.cat(parts)):
        for found, expected in zip(by_expert(given, sizes, align), parts, strict=True):
            assert torch.equal(found, expected)
    assert torch.equal(by_expert(padded[0], sizes[:1], align)[0], parts[0])  # SequentialMLP: one expert at a time


def test_the_registry_says_which_estimator_watches_what():
    names = {kind: {cls.axis for cls in found} for kind, found in REGISTRY.items()}
    assert names[MLP] >= {"ffn", "ffn_pre_activation"}
    assert names[MoELayer] >= {"experts", "expert_ffn", "shared_expert_ffn"}
    assert names[MLASelfAttention] >= {"q_latent", "kv_latent"}
