"""Configs of Qwen3-MoE: published sizes, which layers are mixtures, both versions' keys, and what is refused."""

import pytest
from pico import SIZES

from nemo_minitron.errors import InputError
from nemo_minitron.families import family_of, family_of_nemo, from_hf, read_config, to_hf

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
CONFIG = SIZES | EXPERTS | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
# layers, hidden, heads, ffn, an expert's width -> parameters of the model card's config
PUBLISHED = [
    ((48, 2048, 32, 6144, 768, 128), 30_532_122_624),  # Qwen3-30B-A3B
    ((94, 4096, 64, 12288, 1536, 128), 235_093_634_560),  # Qwen3-235B-A22B
    ((48, 2048, 32, 6144, 768, 64), 16_030_316_544),  # half of the experts of the first
]


def published(layers, hidden, heads, ffn, width, experts):
    return CONFIG | {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": ffn,
        "moe_intermediate_size": width, "num_experts": experts, "num_experts_per_tok": 8, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151_936,
    }  # fmt: skip


@pytest.mark.parametrize(("sizes", "count"), PUBLISHED)
def test_published_sizes(sizes, count):
    assert from_hf(published(*sizes)).parameters() == count


@pytest.mark.parametrize("step", [1, 2, 3, 6])
@pytest.mark.parametrize("dense", [None, [], [1], [5, 2, 0], [7]])
def test_the_mixtures_are_transformers(step, dense):
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    fields = {"decoder_sparse_step": step, "mlp_only_layers": dense}
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG | fields))
    theirs = tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))
    if not theirs:
        with pytest.raises(InputError, match=r"no layer of this Qwen3MoeForCausalLM is a mixture of experts"):
            from_hf(CONFIG | fields)
        return
    architecture = from_hf(CONFIG | fields)
    assert architecture.moe_layers == theirs
    assert architecture.parameters() == model.num_parameters()


def test_the_dense_layers_go_with_the_layers():
    base = CONFIG | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}  # mixtures: 1 and 5
    student = from_hf(base).keep_layers([0, 1, 3, 5])
    config = to_hf(student, base)
    assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, [0, 2])
    assert from_hf(config) == student
    unchanged = to_hf(from_hf(base).replace(hidden_size=40), base)
    assert (unchanged["decoder_sparse_step"], unchanged["mlp_only_layers"]) == (2, [3])
    with pytest.raises(InputError, match="the layers that stay are all dense"):
        to_hf(from_hf(base).keep_layers([0, 2]), base)


def test_the_width_of_dense_layers_is_kept_where_there_are_none():
    student = from_hf(CONFIG).replace(moe_ffn_hidden_size=24)
    assert (to_hf(student, CONFIG)["intermediate_size"], student.ffn_hidden_size) == (96, 24)


def test_the_number_of_experts_has_another_name_in_transformers_5():
    newer = {name: value for name, value in CONFIG.items() if name != "num_experts"} | {"num_local_experts": 4}
    assert read_config(newer) == CONFIG
    with pytest.raises(InputError, match="num_experts is 4 and its num_local_experts is 5"):
        from_hf(CONFIG | {"num_local_experts": 5})


@pytest.mark.parametrize("normalized", [True, False])
def test_a_nemo_checkpoint_of_the_class_is_this_family(normalized):
    config = CONFIG | {"norm_topk_prob": normalized, "mlp_only_layers": [2]}
    name, fields = family_of(config).nemo_config(config)
    assert (name, fields["moe_router_pre_softmax"]) == ("Qwen3MoEConfig", not normalized)
    family = family_of_nemo("Qwen3Model", fields)
    assert family is family_of(config)
    found = family.from_nemo(fields)
    assert (found["norm_topk_prob"], found["mlp_only_layers"]) == (normalized, [2])
    assert from_hf(found) == from_hf(config)
    assert family_of_nemo("Qwen3Model", {}).model_type == "qwen3"
    assert family.from_nemo(fields | {"moe_layer_freq": 2})["mlp_only_layers"] == [1, 3, 5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; it must be a whole number of at least 1"),
        ({"mlp_only_layers": "2"}, "mlp_only_layers is '2'; it must be a list of layer numbers"),
        ({"norm_topk_prob": "no"}, "norm_topk_prob is 'no'; it must be true or false"),
        ({"norm_topk_prob": True, "num_experts_per_tok": 1}, "the nearest legal num_experts_per_tok is 2"),
        ({"num_experts": 1}, "moe_router_topk is 2 of 1 experts"),
        ({"attention_bias": True}, "this Qwen3MoeForCausalLM has them in attention alone"),
    ],
)
def test_refused_by_name(fields, message):
    with pytest.raises(InputError, match=message):
        family_of(CONFIG).nemo_config(CONFIG | fields)


@pytest.mark.parametrize(
    "fields", [{"moe_router_score_function": "sigmoid"}, {"moe_shared_expert_intermediate_size": 8}]
)
def test_nemo_models_that_it_cannot_be(fields):
    family = family_of(CONFIG)
    with pytest.raises(InputError, match=f"{next(iter(fields))} is .* a Qwen3MoeForCausalLM needs"):
        family.from_nemo(family.nemo_config(CONFIG)[1] | fields)
