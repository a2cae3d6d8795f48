"""Hugging Face configs <-> Architecture."""

import math

import pytest
from pico import SIZES

from nemo_minitron.errors import InputError
from nemo_minitron.families import family_of, from_hf, read_config, to_hf

LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
GROUPS = "num_key_value_heads"
MISTRAL = SIZES | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 3}
MIXTRAL = SIZES | EXPERTS | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, MIXTRAL])
def test_round_trip(config):
    architecture = from_hf(config)
    assert (architecture.num_layers, architecture.hidden_size, architecture.ffn_hidden_size) == (6, 48, 96)
    assert (architecture.num_attention_heads, architecture.num_query_groups) == (6, 3)
    assert architecture.head_dim == 8
    assert to_hf(architecture, config) == config


@pytest.mark.parametrize("config", [LLAMA, MISTRAL])
def test_student_config(config):
    smaller = from_hf(config).replace(num_layers=4, hidden_size=40, ffn_hidden_size=64, num_attention_heads=3)
    result = to_hf(smaller, config | {"torch_dtype": "bfloat16", "custom": [1, 2]})
    assert from_hf(result) == smaller
    changed = {name: value for name, value in result.items() if config.get(name) != value}
    assert changed == {
        "num_hidden_layers": 4, "hidden_size": 40, "intermediate_size": 64, "num_attention_heads": 3,
        "torch_dtype": "bfloat16", "custom": [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize("absent", [(), ("head_dim",), (GROUPS,), (GROUPS, "head_dim")])
@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "MixtralConfig"])
def test_defaults_are_transformers(name, absent):
    import transformers

    sizes = without(SIZES | {"num_attention_heads": 24, "hidden_size": 96, "head_dim": 4}, *absent)
    theirs = getattr(transformers, name)(**sizes)
    architecture = from_hf(sizes | {"model_type": theirs.model_type})
    assert architecture.num_query_groups == theirs.num_key_value_heads
    assert architecture.head_dim == (getattr(theirs, "head_dim", None) or 96 // 24)


def test_student_config_of_a_mixture():
    architecture = from_hf(MIXTRAL)
    assert (architecture.num_moe_experts, architecture.moe_router_topk, architecture.moe_ffn_hidden_size) == (5, 3, 96)
    smaller = architecture.replace(num_layers=4, num_moe_experts=4, moe_ffn_hidden_size=64)
    result = to_hf(smaller, MIXTRAL)
    assert from_hf(result) == smaller
    changed = {name: value for name, value in result.items() if MIXTRAL.get(name) != value}
    assert changed == {"num_hidden_layers": 4, "num_local_experts": 4, "intermediate_size": 64}
    with pytest.raises(InputError, match="cannot represent"):
        to_hf(architecture.replace(moe_layer_freq=2), MIXTRAL)


def test_defaults_of_a_mixture_are_transformers():
    import transformers

    theirs, ours = transformers.MixtralConfig(**SIZES), from_hf(without(MIXTRAL, *EXPERTS))
    assert (ours.num_moe_experts, ours.moe_router_topk) == (theirs.num_local_experts, theirs.num_experts_per_tok)
    silent = without(MIXTRAL, "rope_theta", "rms_norm_eps", "max_position_embeddings")
    _, fields = family_of(MIXTRAL).nemo_config(silent)
    theirs = transformers.MixtralConfig()
    assert fields["rotary_base"] == theirs.rope_theta
    assert fields["layernorm_epsilon"] == theirs.rms_norm_eps
    assert fields["seq_length"] == fields["max_position_embeddings"] == theirs.max_position_embeddings
    assert fields["moe_aux_loss_coeff"] == theirs.router_aux_loss_coef


def test_names_of_a_mixture_are_transformers():
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**MIXTRAL))
    shapes = from_hf(MIXTRAL).shapes()
    names = family_of(MIXTRAL).hf_tensors(from_hf(MIXTRAL))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: shapes[part] for name, (part,) in names.items()} == expected


def test_nemo_fields_of_a_mixture_give_the_config_back():
    config = MIXTRAL | {"hidden_act": "silu", "sliding_window": 64, "initializer_range": 0.03}
    config |= {"router_aux_loss_coef": 0.01}
    _, fields = family_of(MIXTRAL).nemo_config(config)
    assert family_of(MIXTRAL).from_nemo(fields) == without(config, "bos_token_id", "eos_token_id")


def test_head_dim_is_written_out():
    config = without(LLAMA, "head_dim") | {"head_dim": None}
    student = from_hf(config).replace(num_attention_heads=3)
    assert to_hf(student, config)["head_dim"] == 8  # not 48 / 3


def test_features():
    architecture = from_hf(LLAMA | {"attention_bias": True, "tie_word_embeddings": True})
    assert architecture.qkv_bias
    assert architecture.attention_output_bias
    assert not architecture.mlp_bias
    assert architecture.tied_embeddings
    assert not from_hf(MISTRAL).qkv_bias


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"])
def test_missing_size(name):
    with pytest.raises(InputError, match=f"no '{name}'"):
        from_hf(without(LLAMA, name))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1, 0, "48", 48.0, [48], True])
@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size", "num_key_value_heads"])
def test_illegal_size(name, bad):
    with pytest.raises(InputError, match="must be a whole number"):
        from_hf(LLAMA | {name: bad})


def test_unknown_class():
    with pytest.raises(InputError, match="'PhiForCausalLM' are not supported; supported are: Llama"):
        from_hf(LLAMA | {"architectures": ["PhiForCausalLM"]})
    with pytest.raises(InputError, match="not supported"):
        from_hf({})
    with pytest.raises(InputError, match="must be a list"):
        from_hf(LLAMA | {"architectures": 5})


def test_what_a_config_cannot_represent():
    with pytest.raises(InputError, match="cannot represent"):
        to_hf(from_hf(LLAMA).replace(qk_norm=True), LLAMA)
    with pytest.raises(InputError, match="cannot represent"):
        to_hf(from_hf(LLAMA | {"attention_bias": True}), MISTRAL)


def test_no_name_for_a_tensor():
    biased = from_hf(LLAMA).replace(qkv_bias=True)
    with pytest.raises(InputError, match=r"no name for the tensor 'layers\.0\.k\.bias'"):
        family_of(MISTRAL).hf_tensors(biased)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no config\.json"):
        read_config(tmp_path)
    for text in ("[1]", "{", "\x00", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config"):
            read_config(tmp_path)
