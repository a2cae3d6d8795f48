"""Cuts and scores of DeepSeek: a router's groups, latents, heads without query groups, and its correction bias."""

import numpy as np
import pytest
from test_deepseek import GROUPS, MOONLIGHT

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.errors import InputError
from nemo_minitron.export.formatting import size_rows
from nemo_minitron.families import from_hf
from nemo_minitron.importance.alternatives import magnitude, random_scores
from nemo_minitron.search import plan, random_plan
from nemo_minitron.search.space import make_space
from nemo_minitron.settings.calibration import axes_of

SMALL = GROUPS | {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 24, "n_routed_experts": 16, "n_group": 4,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 18,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 7, "vocab_size": 101, "topk_group": 3,
}  # fmt: skip


def test_each_group_keeps_the_same_number_of_experts():
    source = from_hf(SMALL)
    scores = random_scores(source)
    scores.tensors["experts"][:] = np.arange(16)  # whole groups would win
    found = plan(scores, {"experts": 12})
    for layer in (1, 2):
        assert found.keep["experts"][layer] == [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15]
    assert found.target.moe_router_num_groups == 4
    assert set(make_space(source, bounds={"experts": (8, 16)}).sizes["experts"]) == {8, 12, 16}
    with pytest.raises(InputError, match=r"13 experts do not divide into 4 groups; the nearest .* is 12"):
        plan(scores, {"experts": 13})
    uneven = {layer: list(range(12)) for layer in (1, 2)}
    with pytest.raises(InputError, match="each of the router's groups must keep 3 of its 4 experts"):
        PrunePlan(source, found.target, {"experts": uneven})


def test_axes_and_scores():
    source = from_hf(SMALL)
    axes = axes_of(source)
    assert {"q_latent", "kv_latent", "heads", "shared_expert_ffn"} <= {*axes}
    assert "query_groups" not in axes
    assert random_scores(source).tensors["kv_latent"].shape == (3, 18)
    cut = random_plan(source, {"heads": 3, "q_latent": 15, "kv_latent": 12})
    assert "query_groups" not in cut.keep
    assert cut.target.shapes()["layers.0.kv_up.weight"] == (3 * (6 + 7), 12)
    with pytest.raises(InputError, match="the model has no 'query_groups' to cut"):
        random_plan(source, {"query_groups": 1})
    with pytest.raises(InputError, match="the model has no 'q_latent' to cut"):
        random_plan(from_hf(MOONLIGHT), {"q_latent": 1})


class Ones:
    """Weights of 1, and correction biases of 1000."""

    def __init__(self, architecture):
        self.architecture = architecture

    def dtype(self, name):
        return "F32"

    def read(self, name, index):
        value = 1000.0 if name.endswith("expert_bias") else 1.0
        return np.full([len(i) for i in index], value, np.float32).view(np.uint32)


def test_a_correction_bias_is_in_no_magnitude():
    source = from_hf(SMALL)
    found = magnitude(Ones(source)).tensors
    np.testing.assert_allclose(found["experts"][1], np.full(16, (64 + 3 * 64 * 24) ** 0.5), rtol=1e-6)
    assert found["layers"].max() < 1000


def test_a_card_shows_the_latents():
    small = from_hf(SMALL)
    rows = {row[0]: row[1:] for row in size_rows(small, small.replace(kv_lora_rank=12))}
    assert rows["latent of keys and values"][:2] == ("18", "12")
    assert rows["latent of queries"][:2] == ("20", "20")
    assert "query groups" not in rows
    assert "latent of queries" not in {row[0] for row in size_rows(from_hf(MOONLIGHT), from_hf(MOONLIGHT))}
