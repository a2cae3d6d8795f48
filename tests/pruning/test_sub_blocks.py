"""Which sub-blocks a plan leaves to fit, the cut within them, and the student's part of a fitted one."""

import numpy as np
import pytest
from test_architecture import mixed, smollm2
from test_axes import HYBRID, LATENT

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.reconstruction import (
    check_reconstruction,
    cut_blocks,
    cut_within,
    fitted_blocks,
    fitted_matrices,
    of_student,
    within,
)
from nemo_minitron.search import random_plan


def names(blocks):
    return [block.name for block in blocks]


@pytest.mark.parametrize(
    ("source", "sizes", "expected"),
    [
        (smollm2(), {"ffn_hidden_size": 1024}, ["MLP"]),
        (smollm2(), {"num_attention_heads": 6}, ["attention"]),
        (smollm2(), {"num_attention_heads": 6, "num_query_groups": 2, "ffn_hidden_size": 1024}, ["attention", "MLP"]),
        (smollm2(), {"hidden_size": 512, "num_layers": 20}, []),
        (mixed(), {"num_moe_experts": 2}, ["experts"]),
        (mixed(), {"moe_router_topk": 1}, ["experts"]),
        (mixed(), {"moe_shared_expert_intermediate_size": 200, "ffn_hidden_size": 1024}, ["MLP", "experts"]),
        (LATENT, {"num_attention_heads": 1, "kv_lora_rank": 7}, []),  # attention with latents is not fitted
        (LATENT, {"num_attention_heads": 1, "ffn_hidden_size": 5}, ["MLP"]),
        (HYBRID, {"mamba_num_heads": 5}, ["Mamba"]),
        (HYBRID, {"mamba_head_dim": 2, "ffn_hidden_size": 5}, ["MLP", "Mamba"]),
    ],
)
def test_kinds(source, sizes, expected):
    target = source.replace(**sizes)
    assert names(cut_blocks(source, target)) == expected
    if not expected:
        with pytest.raises(InputError, match="here none does; leave it out"):
            check_reconstruction(source, target)


def test_a_dropped_kind_of_layer_leaves_nothing_to_fit():
    """All Mamba layers go, and the others lose nothing."""
    others = [i for i, symbol in enumerate(HYBRID.hybrid_pattern) if symbol != "M"]
    assert cut_blocks(HYBRID, HYBRID.keep_layers(others)) == []


@pytest.fixture(scope="module")
def plan():
    """Layers 0 and 3 of the source are mixtures."""
    source = mixed(num_moe_experts=4)
    keep = {"layers": [1, 3, 5], "hidden": list(range(64, 576)), "heads": {}, "experts": {3: [0, 2]}, "expert_ffn": {}}
    keep["heads"] = {layer: [0, 2, 3, 5, 6, 7 + layer % 2] for layer in keep["layers"]}
    keep["expert_ffn"] = {3: {0: list(range(200)), 2: list(range(100, 300))}}
    target = source.keep_layers([1, 3, 5]).replace(
        hidden_size=512, num_attention_heads=6, num_moe_experts=2, moe_ffn_hidden_size=200
    )
    return PrunePlan(source, target, keep)


def test_the_cut_within_sub_blocks(plan):
    """All layers, all hidden channels; a dropped layer is cut like the first that stays."""
    made = cut_within(plan)
    assert made.target == within(plan.source, plan.target)
    assert made.target.num_layers == 6
    assert made.target.hidden_size == 576
    assert made.keep.keys() == {"heads", "experts", "expert_ffn"}
    assert made.keep["heads"] == {n: plan.keep["heads"].get(n, plan.keep["heads"][1]) for n in range(6)}
    assert made.keep["experts"] == {0: [0, 2], 3: [0, 2]}
    assert made.keep["expert_ffn"][0] == plan.keep["expert_ffn"][3]


def test_what_is_fitted(plan):
    """Attention of each kept layer, and the mixture; the MLPs of layers 1 and 5 lose nothing."""
    assert {layer: names(blocks) for layer, blocks in fitted_blocks(plan).items()} == {
        1: ["attention"], 3: ["attention", "experts"], 5: ["attention"],
    }  # fmt: skip
    found = {name: origin for name, origin, _ in fitted_matrices(plan)}
    shapes, student = cut_within(plan).target.shapes(), plan.target.shapes()
    assert set(found.values()) <= shapes.keys()
    assert {n for n in found if n.startswith("layers.1.")} == {
        f"layers.1.{part}.weight"
        for part in ["q", "k", "v", "o", *(f"{e}.{n}" for e in ("experts.0", "experts.1", "shared_expert")
                                           for n in ("gate", "up", "down"))]
    }  # fmt: skip
    assert found["layers.1.experts.1.up.weight"] == "layers.3.experts.1.up.weight"
    for name, origin in found.items():
        fitted = np.arange(np.prod(shapes[origin]), dtype=np.float32).reshape(shapes[origin])
        made = of_student(plan, name, fitted)
        assert made.shape == student[name]
        writes = name.split(".")[-2] in ("o", "down")
        np.testing.assert_array_equal(made, fitted[64:] if writes else fitted[:, 64:])


def test_without_a_cut_of_channels_it_stays_whole():
    plan = random_plan(smollm2(num_layers=2), keep={"ffn": 1024})
    fitted = np.ones((1024, 576), np.float32)
    assert of_student(plan, "layers.0.gate.weight", fitted) is fitted
