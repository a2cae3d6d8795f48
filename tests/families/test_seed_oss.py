"""Configs of Seed-OSS: its published size, its biases, NeMo's LlamaModel, and what is refused."""

import pytest
from pico import SIZES

from nemo_minitron.errors import InputError
from nemo_minitron.families import family_of, family_of_nemo, from_hf, to_hf

CONFIG = SIZES | {"architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss"}
# layers, hidden, heads, groups, ffn, vocabulary -> transformers' count of these sizes
COUNTED = [
    ((64, 5120, 80, 8, 27_648, 155_136), 36_151_104_512),  # Seed-OSS-36B, Base and Instruct
    ((64, 4096, 80, 8, 27_648, 155_136), 28_921_040_896),  # the defaults of SeedOssConfig
]


@pytest.mark.parametrize(("sizes", "count"), COUNTED)
def test_published_size(sizes, count):
    layers, hidden, heads, groups, ffn, vocabulary = sizes
    fields = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "head_dim": 128}
    fields |= {"num_key_value_heads": groups, "intermediate_size": ffn, "vocab_size": vocabulary}
    assert from_hf(CONFIG | fields).parameters() == count


@pytest.mark.parametrize("fields", [{}, {"attention_bias": False}, {"attention_out_bias": True, "mlp_bias": True}])
def test_biases_are_transformers(fields):
    import torch
    from transformers import SeedOssConfig, SeedOssForCausalLM

    with torch.device("meta"):
        model = SeedOssForCausalLM(SeedOssConfig(**CONFIG | fields))
    architecture = from_hf(CONFIG | fields)
    names = family_of(CONFIG).hf_tensors(architecture)
    assert names.keys() == {name for name, _ in model.named_parameters()}
    assert architecture.parameters() == model.num_parameters()
    assert to_hf(architecture.replace(hidden_size=40), CONFIG | fields)["hidden_size"] == 40


def test_a_nemo_checkpoint_is_a_llama_with_biases_of_q_k_and_v():
    family, (name, fields) = family_of(CONFIG), family_of(CONFIG).nemo_config(CONFIG)
    assert (name, fields["add_qkv_bias"], fields["add_bias_linear"]) == ("LlamaConfig", True, False)
    assert family_of_nemo("LlamaModel", fields) is family
    found = family.from_nemo(fields)
    assert (found["attention_bias"], found["attention_out_bias"], found["mlp_bias"]) == (True, False, False)
    with pytest.raises(InputError, match="add_qkv_bias is False; a SeedOssForCausalLM needs True"):
        family.from_nemo(fields | {"add_qkv_bias": False})


@pytest.mark.parametrize("fields", [{"attention_bias": False}, {"attention_out_bias": True}, {"mlp_bias": True}])
def test_other_biases_are_refused_by_name(fields):
    with pytest.raises(InputError, match="in NeMo's LlamaModel has biases in q, k and v alone: attention_bias true"):
        family_of(CONFIG).nemo_config(CONFIG | fields)


def test_the_first_to_claim_a_llama_model_is_the_only_one():
    """Four families share NeMo's LlamaModel."""
    own = {"llama": {}, "arcee": {"gated_linear_unit": False}, "seed_oss": {"add_qkv_bias": True}}
    own["smollm3"] = {"no_rope_freq": [0, 1]}
    for kind, fields in own.items():
        assert family_of_nemo("LlamaModel", fields).model_type == kind
