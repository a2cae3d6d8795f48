"""Configs of transformers 4 and 5: one model, whichever version wrote its config.json."""

import json

import pytest
from contract import FULL, LLAMA3_ROPE, MODELS, SLIDING, megatron_fields
from pico import SIZES

from nemo_minitron.errors import InputError
from nemo_minitron.families import FAMILIES, family_of, from_hf, read_config, to_hf, written_config
from nemo_minitron.families.forms import normalized

FAMILY = {family.model_type: family for family in FAMILIES}
ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def config(model_type, **fields):
    return SIZES | {"model_type": model_type, "architectures": [FAMILY[model_type].hf_class]} | fields


def in_form_5(old):
    """What transformers 5 writes of a config of transformers 4."""
    new = {name: value for name, value in old.items() if name not in (*ROPE_KEYS, "torch_dtype")}
    scaling = dict(old.get("rope_scaling") or {"rope_type": "default"})
    scaling |= {name: old[name] for name in ("rope_theta", "partial_rotary_factor") if name in old}
    if old["model_type"] == "gemma3_text":  # a mapping for each kind of layer
        base = new.pop("rope_local_base_freq", 1e4)
        scaling = {FULL: scaling, SLIDING: {"rope_type": "default", "rope_theta": base}}
    return new | {"rope_parameters": scaling, "dtype": old.get("torch_dtype", "float32")}


def variants():
    for model_type, kinds in MODELS.items():
        for kind, fields in kinds.items():
            fields = {"num_hidden_layers": len(fields.get("layer_types", range(6)))} | fields
            yield pytest.param(config(model_type, torch_dtype="bfloat16", **fields), id=f"{model_type}-{kind}")


@pytest.mark.parametrize("old", variants())
def test_either_form_is_the_same_model(old, tmp_path):
    new = in_form_5(old)
    assert from_hf(new) == from_hf(old)
    assert megatron_fields(normalized(new)) == megatron_fields(old)
    assert normalized(new)["torch_dtype"] == "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(new))
    assert read_config(tmp_path) == normalized(new) == normalized(normalized(new))


@pytest.mark.parametrize("old", variants())
def test_a_student_says_the_same_to_both_versions(old):
    """What is written holds the keys of each version, and each version's keys alone give the model back."""
    smaller = from_hf(old).keep_layers(range(4)).replace(ffn_hidden_size=64)
    written = written_config(to_hf(smaller, in_form_5(old), range(4)))
    assert (written["torch_dtype"], written["dtype"]) == ("bfloat16", "bfloat16")
    only_4 = {name: value for name, value in written.items() if name not in ("rope_parameters", "dtype")}
    only_5 = {name: value for name, value in written.items() if name not in (*ROPE_KEYS, "torch_dtype")}
    assert from_hf(only_4) == from_hf(only_5) == from_hf(written)
    fields = [megatron_fields(normalized(form)) for form in (only_4, only_5, written)]
    assert fields[0] == fields[1] == fields[2]
    assert fields[0]["rotary_base"] == 5000.0


def test_a_default_of_the_class_is_written_out():
    """transformers 5 fills a missing base from its class; Mixtral's is not Llama's."""
    silent = {name: value for name, value in config("mixtral").items() if name != "rope_theta"}
    assert written_config(silent)["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}
    silent = {name: value for name, value in config("nemotron").items() if name != "rope_theta"}
    part = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert written_config(silent)["rope_parameters"] == part


def test_llama3_scaling_of_transformers_5_is_read():
    old = config("llama", rope_scaling=LLAMA3_ROPE)
    name, fields = family_of(old).nemo_config(normalized(in_form_5(old)))
    assert (name, fields["scale_factor"], fields["old_context_len"]) == ("Llama31Config", 8.0, 16)


@pytest.mark.parametrize("kind", ["yarn", "longrope", "dynamic", "proportional"])
@pytest.mark.parametrize("model_type", [kind for kind, family in FAMILY.items() if "nemo" in family.hosts])
def test_a_scaling_that_is_refused_is_refused_in_either_form(model_type, kind):
    old = config(model_type, rope_scaling={"rope_type": kind, "factor": 4.0})
    for form in (old, in_form_5(old), config(model_type, rope_scaling={"type": kind, "factor": 4.0})):
        with pytest.raises(InputError, match=f"rope_scaling '{kind}' is not supported by NeMo's"):
            family_of(form).nemo_config(normalized(form))


def test_types_of_layers_that_rotate_alike():
    """Gemma 3's form of the key: one mapping for each type of layer."""
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    alike = config("qwen3", rope_parameters={"full_attention": rope, "sliding_attention": rope})
    assert normalized(alike)["rope_theta"] == 5000.0
    other = alike | {"rope_parameters": {"full_attention": rope, "sliding_attention": rope | {"rope_theta": 1e6}}}
    with pytest.raises(InputError, match="differs between full_attention and sliding_attention"):
        normalized(other)
    with pytest.raises(InputError, match="mixes fields with types of layers"):
        normalized(alike | {"rope_parameters": {"full_attention": rope, "rope_theta": 1.0}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_parameters": {"rope_theta": 1e6}},
            r"rope_theta is 5000.0 and its rope_parameters.rope_theta is 1000000",
        ),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}}, "its rope_scaling.rope_theta is 1000000"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            "rope_scaling is .* and its rope_parameters is",
        ),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "torch_dtype is 'bfloat16' and its dtype is 'float32'"),
        ({"rope_parameters": [1]}, "rope_parameters is .* must be a mapping"),
        ({"rope_parameters": "default"}, "must be a mapping"),
    ],
)
def test_forms_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        from_hf(config("llama") | fields)


def test_the_factor_that_transformers_5_writes_beside_the_models_own():
    """It saves a Nemotron's default of 0.5 beside `rope_parameters`, whatever the model's is."""
    new = in_form_5(config("nemotron", partial_rotary_factor=0.75)) | {"partial_rotary_factor": 0.5}
    assert normalized(new)["partial_rotary_factor"] == 0.75
    with pytest.raises(InputError, match=r"partial_rotary_factor is 0\.5 and its rope_parameters\.partial"):
        normalized(new | {"rope_theta": 5000.0})


def test_both_forms_that_agree_are_one():
    scaling = {"rope_type": "linear", "factor": 2.0}
    both = config("llama", rope_scaling=scaling, rope_parameters=scaling | {"rope_theta": 5000})
    assert normalized(both) == config("llama", rope_scaling=scaling)
