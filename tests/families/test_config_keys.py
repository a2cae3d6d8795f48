"""Every key that transformers' class of a family knows is read, of no effect, or refused; lists go with the layers."""

import pytest
from contract import HYBRIDS, MODELS
from pico import SIZES

from nemo_minitron.errors import InputError
from nemo_minitron.families import FAMILIES, family_of_nemo, from_hf, remarks, to_hf
from nemo_minitron.families.forms import normalized
from nemo_minitron.families.keys import FULL, NO_EFFECT, ONE_VALUE, PER_LAYER, READ, SLIDING

FAMILY = {family.model_type: family for family in FAMILIES if family.model_type not in HYBRIDS}


# each head of a DeepSeek has its own key; the classes' own numbers of dense layers and experts are not for six layers
OWN = {"num_key_value_heads": None, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1}


def config(model_type, **fields):
    own = OWN if model_type.startswith("deepseek") else {}
    return SIZES | own | {"model_type": model_type, "architectures": [FAMILY[model_type].hf_class]} | fields


@pytest.mark.parametrize("model_type", FAMILY)
def test_every_key_of_transformers_4_is_claimed(model_type):
    from transformers import AutoConfig

    known = normalized(AutoConfig.for_model(model_type).to_dict())
    assert FAMILY[model_type].unread(known) == []


@pytest.mark.parametrize("model_type", FAMILY)
def test_every_default_of_transformers_4_is_legal(model_type):
    from transformers import AutoConfig

    known = normalized(AutoConfig.for_model(model_type).to_dict())
    for name, value in ONE_VALUE.items():
        if name not in FAMILY[model_type].read:
            assert known.get(name, value) in (value, None), name
    groups = {"num_key_value_heads": None, "num_experts_per_tok": 8} if "n_group" in known else {}
    from_hf(known | {"architectures": [FAMILY[model_type].hf_class], "num_key_value_heads": 8} | groups)


@pytest.mark.parametrize("model_type", FAMILY)
def test_no_key_is_claimed_twice(model_type):
    read = FAMILY[model_type].read
    assert not read & READ
    # some families read what is of no effect, or has one value, in others
    assert read & NO_EFFECT <= {"initializer_range"}
    assert not NO_EFFECT & ONE_VALUE.keys()
    assert not NO_EFFECT & PER_LAYER.keys()


@pytest.mark.parametrize("model_type", FAMILY)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pruned_heads", {"1": [0]}), ("quantization_config", {"quant_method": "awq"}), ("is_encoder_decoder", True),
        ("add_cross_attention", True), ("no_rope_layers", [1, 1, 0, 1, 1, 0]), ("mlp_only_layers", [2]),
        ("mlp_layer_types", ["dense"] * 5 + ["sparse"]), ("moe_layers", [0]), ("no_rope_layers", 3),
    ],
)  # fmt: skip
def test_what_changes_the_function_is_refused_by_name(model_type, name, value):
    from_hf(config(model_type, **{name: None}))
    if name in FAMILY[model_type].read:
        pytest.skip("this family reads it")
    with pytest.raises(InputError, match=f"the config's {name} is "):
        from_hf(config(model_type, **{name: value}))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mixtral", "qwen2", "qwen3"])
def test_a_part_of_the_head_that_transformers_would_rotate_is_refused(model_type):
    from_hf(config(model_type, partial_rotary_factor=1.0))
    for fields in ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}):
        with pytest.raises(InputError, match=r"partial_rotary_factor is 0\.5, which is not .* legal is 1\.0"):
            from_hf(config(model_type, **fields))


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "nemotron", "phi3"])
def test_types_of_layers_that_the_class_does_not_read(model_type):
    assert to_hf(from_hf(config(model_type)), config(model_type, layer_types=[FULL] * 6))["layer_types"] == [FULL] * 6
    with pytest.raises(InputError, match="the config's layer_types is"):
        from_hf(config(model_type, layer_types=[FULL] * 5 + [SLIDING]))


def test_a_class_of_another_model_type_is_refused():
    """transformers goes by model_type, this package by the class: they must name one family."""
    with pytest.raises(InputError, match="model_type is 'granite'; that of a LlamaForCausalLM is 'llama'"):
        from_hf(config("llama") | {"model_type": "granite"})


# -- lists go with the layers ----------------------------------------------------------------------------------
@pytest.mark.parametrize("model_type", ["ministral", "mistral", "qwen2", "qwen3"])
def test_layer_types_are_cut_with_the_layers(model_type):
    kinds = [FULL, SLIDING, FULL, SLIDING, SLIDING, FULL]
    base = config(model_type, layer_types=kinds, sliding_window=8, use_sliding_window=True)
    base = {n: v for n, v in base.items() if n != "use_sliding_window" or "stral" not in model_type}
    smaller = from_hf(base).replace(num_layers=3)
    assert to_hf(smaller, base, [0, 3, 5])["layer_types"] == [FULL, SLIDING, FULL]
    with pytest.raises(InputError, match=r"differ from layer to layer, .* cut to 3 before it is known which ones stay"):
        to_hf(smaller, base)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
@pytest.mark.parametrize("bad", [[FULL] * 5, FULL, [1] * 6, ["chunked_attention"] * 6, {"0": FULL}])
def test_layer_types_of_another_form_are_refused(model_type, bad):
    with pytest.raises(InputError, match="layer_types"):
        from_hf(config(model_type, layer_types=bad))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_max_window_layers_counts_the_layers_that_stay(model_type):
    base = config(model_type, use_sliding_window=True, sliding_window=8, max_window_layers=4)
    smaller = from_hf(base).replace(num_layers=4)
    assert to_hf(smaller, base, [0, 2, 4, 5])["max_window_layers"] == 2
    assert to_hf(smaller, base, [0, 1, 2, 3])["max_window_layers"] == 4
    unused = config(model_type, use_sliding_window=False, max_window_layers=6)
    assert to_hf(smaller, unused)["max_window_layers"] == 4
    with pytest.raises(InputError, match="max_window_layers is 'x'"):
        to_hf(smaller, unused | {"max_window_layers": "x"})


def test_a_list_that_nothing_reads_stops_a_cut_of_layers():
    """It may hold one value a layer, and a wrong one would go unseen."""
    base = config("llama", my_scales=[1, 2, 3, 4, 5, 6])
    assert to_hf(from_hf(base).replace(ffn_hidden_size=64), base)["my_scales"] == [1, 2, 3, 4, 5, 6]
    for layers in (None, [0, 1, 2, 3]):
        with pytest.raises(InputError, match="my_scales has one value for each of the 6 layers"):
            to_hf(from_hf(base).replace(num_layers=4), base, layers)
    alike = config("llama", my_scales=[1.0] * 6)
    assert to_hf(from_hf(alike).replace(num_layers=4), alike)["my_scales"] == [1.0] * 4


# -- NeMo's classes --------------------------------------------------------------------------------------------
def test_a_mistral_with_layer_types_is_windowed_in_some_layers():
    family, window = FAMILY["mistral"], {"sliding_window": 16}
    assert family.nemo_config(config("mistral", **window))[1]["window_size"] == [15, 0]
    assert family.nemo_config(config("mistral", layer_types=[SLIDING] * 6, **window))[1]["window_size"] == [15, 0]
    assert family.nemo_config(config("mistral", layer_types=[FULL] * 6, **window))[1]["window_size"] is None
    mixed = family.nemo_config(config("mistral", layer_types=[FULL] * 5 + [SLIDING], **window))[1]
    assert (mixed["window_size"], mixed["window_attn_skip_freq"]) == ([15, 0], [0, 0, 0, 0, 0, 1])
    assert family_of_nemo("MistralModel", mixed).model_type == "ministral"


def test_a_mixtral_reads_no_layer_types():
    base = config("mixtral", layer_types=[FULL] * 6, sliding_window=16)
    assert FAMILY["mixtral"].nemo_config(base)[1]["window_size"] == [15, 0]


@pytest.mark.parametrize("model_type", ["ministral", "mistral", "qwen2", "qwen3", "smollm3"])
def test_a_window_of_no_length_is_refused(model_type):
    base = config(model_type, layer_types=[FULL] * 5 + [SLIDING], sliding_window=None)
    with pytest.raises(InputError, match="gives layers 'sliding_attention', and no sliding_window is in use"):
        FAMILY[model_type].nemo_config(base)


def test_keys_that_nothing_reads_are_one_remark():
    assert remarks(config("llama")) == []
    assert remarks(config("llama", logit_scale=2.0, a_note="x")) == [
        "keys of the config that neither transformers nor this package reads: a_note, logit_scale"
    ]


@pytest.mark.parametrize("model_type", MODELS)
def test_the_pico_models_have_no_remark(model_type, tmp_path):
    import pico

    folder = getattr(pico, f"pico_{model_type}")(tmp_path / "model", num_hidden_layers=1)
    assert remarks(folder) == []
