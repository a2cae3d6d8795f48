"""Configs of Qwen2, Qwen3, Nemotron and Phi-3: published sizes, transformers' defaults, and what is refused."""

import pytest
from contract import HYBRIDS
from pico import SIZES

from nemo_minitron.errors import InputError
from nemo_minitron.families import FAMILIES, family_of, from_hf, to_hf

CLASSES = {family.model_type: family for family in FAMILIES if family.model_type not in HYBRIDS}
# layers, hidden, heads, groups, ffn, vocabulary, billions, billions without embeddings
PUBLISHED = [
    ("nemotron", 32, 6144, 48, 8, 24576, 256_000, 15.629, 12.483),
    ("nemotron", 32, 4096, 48, 8, 16384, 256_000, 8.272, 6.175),
    ("nemotron", 32, 3072, 24, 8, 9216, 256_000, 4.191, 2.618),
    ("qwen3", 36, 4096, 32, 8, 12288, 151_936, 8.191, 6.946),
    ("qwen3", 24, 4096, 32, 8, 12288, 151_936, 5.875, 4.631),
    ("qwen3", 36, 3584, 32, 8, 9216, 151_936, 5.978, 4.889),
]
# Of model cards and counts by transformers: Mistral-7B, Qwen2.5-0.5B and 7B, Qwen3-32B, Phi-3-mini, Phi-4.
COUNTED = [
    ("mistral", 32, 4096, 32, 8, 14336, 32_000, False, 7_241_732_096),
    ("qwen2", 24, 896, 14, 2, 4864, 151_936, True, 494_032_768),
    ("qwen2", 28, 3584, 28, 4, 18944, 152_064, False, 7_615_616_512),
    ("qwen3", 64, 5120, 64, 8, 25600, 151_936, False, 32_762_123_264),
    ("phi3", 32, 3072, 32, 32, 8192, 32_064, False, 3_821_079_552),
    ("phi3", 40, 5120, 40, 10, 17920, 100_352, False, 14_659_507_200),
]


OWN = {"num_key_value_heads": None, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}


def config(model_type, **fields):
    own = OWN if model_type.startswith("deepseek") else {}
    return SIZES | own | {"model_type": model_type, "architectures": [CLASSES[model_type].hf_class]} | fields


def without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


def sized(model_type, layers, hidden, heads, groups, ffn, vocabulary, **fields):
    return {
        "model_type": model_type, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": groups, "intermediate_size": ffn, "vocab_size": vocabulary, **fields,
    }  # fmt: skip


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[0]}-{row[-2]}")
def test_published_sizes(row):
    *sizes, billions, without_embeddings = row
    architecture = from_hf(sized(*sizes, head_dim=128, tie_word_embeddings=False))
    assert round(architecture.parameters() / 1e9, 3) == billions
    assert round(architecture.parameters(embeddings=False) / 1e9, 3) == without_embeddings


@pytest.mark.parametrize("row", COUNTED, ids=lambda row: f"{row[0]}-{row[-1]}")
def test_counted_sizes(row):
    *sizes, tied, count = row
    assert from_hf(sized(*sizes, tie_word_embeddings=tied)).parameters() == count


def test_phi_4s_published_config_is_a_phi_3():
    """Every key that changes what it computes is read; of the others, `attention_bias` is one that nothing reads."""
    published = {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": {},
        "bos_token_id": 100257, "embd_pdrop": 0.0, "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 5120,
        "initializer_range": 0.02, "intermediate_size": 17920, "max_position_embeddings": 16384, "model_type": "phi3",
        "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
        "original_max_position_embeddings": 16384, "pad_token_id": 100257, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 250000, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 100352,
    }  # fmt: skip
    family = family_of(published)
    assert from_hf(published).parameters() == 14_659_507_200
    assert family.unread(published) == ["attention_bias"]
    name, fields = family.nemo_config(published)
    assert (name, fields["rotary_base"], fields["rotary_percent"]) == ("Phi3Config", 250000, 1)
    assert (fields["kv_channels"], fields["window_size"], fields["seq_length"]) == (128, None, 16384)


@pytest.mark.parametrize("absent", [(), ("head_dim",), ("num_key_value_heads",), ("head_dim", "num_key_value_heads")])
@pytest.mark.parametrize("model_type", CLASSES)
def test_sizes_where_a_config_is_silent_are_transformers(model_type, absent):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if model_type == "nemotron" and "num_key_value_heads" in absent:
        pytest.skip("transformers' Nemotron fails without num_key_value_heads")
    if model_type == "ministral" and "head_dim" in absent:
        pytest.skip("transformers' Ministral fails without head_dim")
    heads = 32 if "num_key_value_heads" in absent else 24  # transformers gives Qwen 32 groups
    if model_type.startswith("deepseek") and "num_key_value_heads" in absent:
        pytest.skip("transformers' DeepSeek V3 has 128, whatever the heads")
    if model_type == "qwen2_moe" and absent == ("num_key_value_heads",):
        pytest.skip("transformers 4 needs heads x head_dim for the hidden size")
    sizes = without(config(model_type, num_attention_heads=heads, hidden_size=96, head_dim=4), *absent)
    theirs = AutoConfig.for_model(**sizes | {"pad_token_id": None})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    biases = [buffer.numel() for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
    assert from_hf(sizes).parameters() == model.num_parameters() + sum(biases)


@pytest.mark.parametrize("model_type", CLASSES)
def test_fields_where_a_config_is_silent_are_transformers(model_type):
    from transformers import AutoConfig

    family = CLASSES[model_type]
    theirs = AutoConfig.for_model(model_type).to_dict()
    for name, value in family.defaults.items():
        # transformers drops a window that is not in use
        expected = value if name == "sliding_window" and model_type.startswith("qwen") else theirs[name]
        assert value == expected, name


@pytest.mark.parametrize("model_type", CLASSES)
def test_identity_changes_no_field(model_type):
    base = config(model_type, custom=[1, 2], torch_dtype="bfloat16")
    result = to_hf(from_hf(base), base)
    assert {name: result[name] for name in base} == base
    assert from_hf(result) == from_hf(base)


@pytest.mark.parametrize("model_type", [kind for kind, family in CLASSES.items() if "nemo" in family.hosts])
def test_nemo_fields_give_the_config_back(model_type):
    """What NeMo's config was given, and what a context says of functions, is the Hugging Face config again."""
    base = config(model_type, hidden_act="gelu", norm_eps=3e-5)
    _, fields = family_of(base).nemo_config(base)
    fields["activation_func"] = "torch._C._nn.gelu"  # as torch names it
    found = family_of(base).from_nemo(fields)
    assert {name: value for name, value in found.items() if name in base} == {n: base[n] for n in found if n in base}
    assert from_hf(found) == from_hf(base)


# -- refused ---------------------------------------------------------------------------------------------------
LONGROPE = {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (config("qwen3", attention_bias=True), "this Qwen3ForCausalLM has them in attention alone"),
        (config("nemotron", mlp_bias=True), "this NemotronForCausalLM has them in the MLP alone"),
        (config("phi3", **LONGROPE), "rope_scaling 'longrope' is not supported by NeMo's Phi3Model; it has default"),
        (config("qwen2", rope_scaling={"type": "yarn", "factor": 4.0}), "it has default, linear"),
        (
            config("nemotron", rope_scaling={"rope_type": "linear", "factor": 4.0}),
            "not supported by NeMo's NemotronModel",
        ),
        (config("mistral", rope_scaling={"rope_type": "llama3"}), "not supported by NeMo's MistralModel"),
        (config("qwen2", rope_scaling={"rope_type": "linear"}), "has no 'factor'"),
        (config("qwen2", rope_scaling="linear"), "must be a mapping"),
        (config("qwen2", hidden_act="gelu_new"), "hidden_act 'gelu_new' .* did you mean 'gelu'"),
    ],
)
def test_what_nemos_class_cannot_be(base, message):
    with pytest.raises(InputError, match=message):
        family_of(base).nemo_config(base)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("qwen2", {"add_qkv_bias": False}, "add_qkv_bias is False; a Qwen2ForCausalLM needs True"),
        ("qwen3", {"qk_layernorm": False}, "qk_layernorm is False"),
        ("nemotron", {"layernorm_zero_centered_gamma": False}, "layernorm_zero_centered_gamma is False"),
        ("nemotron", {"gated_linear_unit": True}, "gated_linear_unit is True"),
        ("llama", {"rotary_percent": 0.5}, r"rotary_percent is 0\.5"),
        ("nemotron", {"window_size": [7, 0]}, r"window_size is \[7, 0\]"),
        ("llama", {"window_attn_skip_freq": 2}, "window_attn_skip_freq is 2"),
        ("phi3", {"activation_func": "megatron.core.activations.quick_gelu"}, "quick_gelu' is not one of silu"),
    ],
)
def test_nemo_models_that_transformers_class_cannot_be(model_type, fields, message):
    """They were read as something else before: a NeMo checkpoint says all that a Hugging Face config takes as given."""
    family, base = CLASSES[model_type], config(model_type)
    _, own = family.nemo_config(base)
    family.from_nemo(own)
    with pytest.raises(InputError, match=message):
        family.from_nemo(own | fields)


# -- sizes that transformers cannot load are refused when planning ----------------------------------------------
def test_longrope_wants_a_factor_for_each_pair_of_hidden_over_heads():
    base = config("phi3", **LONGROPE)
    source = from_hf(base)
    assert to_hf(source.replace(hidden_size=50, ffn_hidden_size=20), base)["hidden_size"] == 50  # 50 // 6 is 8
    with pytest.raises(InputError, match=r"hidden_size 40 with 6 heads .* the nearest hidden_size is 48"):
        to_hf(source.replace(hidden_size=40), base)
    with pytest.raises(InputError, match=r"hidden_size 48 with 3 heads .* the nearest hidden_size is 29"):
        to_hf(source.replace(num_attention_heads=3), base)
    with pytest.raises(InputError, match="must be a list"):
        to_hf(source, base | {"rope_scaling": {"type": "longrope", "short_factor": 4}})


@pytest.mark.parametrize("hidden", [29, 40, 47, 48, 53, 54])
def test_longrope_is_refused_where_transformers_refuses_it(hidden):
    from transformers import Phi3Config

    base = config("phi3", **LONGROPE, pad_token_id=None)
    try:
        student = to_hf(from_hf(base).replace(hidden_size=hidden), base)
    except InputError:
        with pytest.raises(ValueError, match="short_factor"):
            Phi3Config(**base | {"hidden_size": hidden})
    else:
        Phi3Config(**student)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_layer_types_follow_the_layers(model_type):
    full, sliding = ["full_attention"], ["sliding_attention"]
    base = config(model_type, layer_types=full * 6)
    assert to_hf(from_hf(base).replace(num_layers=4), base)["layer_types"] == full * 4
    mixed = config(model_type, layer_types=full * 4 + sliding * 2, use_sliding_window=True, sliding_window=8)
    unsaid = without(mixed, "layer_types") | {"max_window_layers": 4}
    for base in (mixed, unsaid):
        assert to_hf(from_hf(base).replace(hidden_size=40), base)["hidden_size"] == 40
        with pytest.raises(InputError, match=r"layers cannot be cut to 5 before .* the nearest legal number is 6"):
            to_hf(from_hf(base).replace(num_layers=5), base)
