"""Configs of longrope: what Megatron-Bridge is told, in both forms, and back; students; refusals."""

import math

import pytest
from pico import SIZES, pico_phi3
from test_config_forms import in_form_5

from nemo_minitron.errors import InputError
from nemo_minitron.families import check_host, family_of, from_hf, read_config, to_hf, written_config
from nemo_minitron.families.bridge import bridge_fields
from nemo_minitron.families.forms import normalized
from nemo_minitron.pruning import prune
from nemo_minitron.search import random_plan

FACTORS = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 4.0, 9.0]}
ROPE = {"type": "longrope", **FACTORS}
OWN = {"original_max_position_embeddings": 32, "partial_rotary_factor": 0.75, "rope_scaling": ROPE}
CONFIG = SIZES | OWN | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": None}


NEWER = in_form_5(CONFIG)
NEWER["rope_parameters"] |= {"original_max_position_embeddings": 32}  # transformers 5 writes it in both places


def fields(config):
    return bridge_fields(family_of(config), config)


@pytest.mark.parametrize(("longest", "original"), [(256, 32), (131_072, 4096), (64, 64), (32, 64)])
def test_the_scale_is_transformers(longest, original):
    """Megatron computes it from its fields of YaRN."""
    from transformers import Phi3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    lengths = {"max_position_embeddings": longest, "original_max_position_embeddings": original}
    found = fields(CONFIG | lengths)
    scale = 1.0
    if found["yarn_rotary_scaling_factor"] > 1:
        scale = 0.1 * found["yarn_mscale"] * math.log(found["yarn_rotary_scaling_factor"]) + 1
    _, expected = ROPE_INIT_FUNCTIONS["longrope"](Phi3Config(**CONFIG | lengths), "cpu")
    assert scale == pytest.approx(expected, rel=1e-12)
    assert [found[f"longrope_{name}"] for name in lengths] == [longest, original]
    assert [found[f"longrope_{name}"] for name in FACTORS] == list(FACTORS.values())
    assert (found["rotary_percent"], found["position_embedding_type"]) == (0.75, "yarn")


def test_every_form_is_the_same_model():
    older = CONFIG | {"rope_scaling": ROPE | {"type": "su"}}
    assert fields(normalized(NEWER)) == fields(normalized(older)) == fields(CONFIG)


@pytest.mark.parametrize("form", [CONFIG, NEWER], ids=["4", "5"])
def test_a_student_says_the_same_to_both_versions(form):
    smaller = from_hf(form).replace(hidden_size=32, num_attention_heads=4, num_query_groups=2)
    written = written_config(to_hf(smaller, form))
    assert normalized(written) == normalized(normalized(written))  # the two forms in it agree
    assert written["rope_scaling"] == ROPE  # transformers 4 takes no other key
    only_5 = {name: value for name, value in written.items() if name not in ("rope_scaling", "rope_theta")}
    del only_5["partial_rotary_factor"]
    assert from_hf(only_5) == from_hf(written) == smaller
    assert fields(normalized(only_5)) == fields(normalized(written))


def test_a_checkpoints_fields_are_the_config_again():
    family, given = family_of(CONFIG), fields(CONFIG)
    # what Bridge trains with is no property of the model
    found = family.from_nemo(given | {"seq_length": 24, "max_position_embeddings": 24})
    assert fields(found) == given
    assert (found["max_position_embeddings"], found["rope_scaling"]) == (256, ROPE)


def test_transformers_4_loads_a_student(tmp_path):
    """Cut along hidden and heads, so that hidden_size / heads stays."""
    from transformers import AutoModelForCausalLM

    teacher = pico_phi3(tmp_path / "teacher", **OWN)
    prune(teacher, random_plan(from_hf(teacher), {"hidden": 16, "query_groups": 1}), tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    expected = AutoModelForCausalLM.from_pretrained(teacher).model.rotary_emb
    found = model.model.rotary_emb
    assert found.inv_freq.tolist() == expected.inv_freq.tolist()
    assert found.attention_scaling == expected.attention_scaling
    assert fields(read_config(tmp_path / "student"))["longrope_long_factor"] == FACTORS["long_factor"]


def test_phi_4_mini():
    """The published sizes and lengths."""
    sizes = {"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8, "num_hidden_layers": 32}
    sizes |= {"intermediate_size": 8192, "vocab_size": 200_064, "tie_word_embeddings": True, "head_dim": None}
    sizes |= {"max_position_embeddings": 131_072, "original_max_position_embeddings": 4096, "sliding_window": 262_144}
    config = CONFIG | sizes | {"rope_scaling": {"type": "longrope", **dict.fromkeys(FACTORS, [1.0] * 48)}}
    assert from_hf(config).parameters() == 3_836_021_760
    check_host(config, "bridge")


def test_nemo_refuses_it_and_names_the_host_that_has_it():
    with pytest.raises(InputError, match=r"'longrope' is not supported by NeMo's .*; Megatron-Bridge has it: give"):
        check_host(CONFIG, "nemo")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3}}, "rope_scaling has no 'long_factor'"),
        ({"rope_scaling": ROPE | {"long_factor": [1.0] * 4}}, "must be 3 numbers above 0, .* it has 4 values"),
        ({"partial_rotary_factor": 1.0}, "short_factor .* must be 4 numbers above 0, .* it has 3 values"),
        ({"rope_scaling": ROPE | {"short_factor": [1.0, 0.0, 1.0]}}, "short_factor .* must be 3 numbers above 0"),
        ({"rope_scaling": ROPE | {"short_factor": 2.0}}, "it has 2.0"),
        ({"rope_scaling": ROPE | {"long_factor": [1.0, math.nan, 1.0]}}, "it must be a finite number"),
        ({"rope_scaling": ROPE | {"attention_factor": 1.5}}, r"attention_factor 1.5, and transformers 4 takes 1\.26"),
        ({"rope_scaling": ROPE | {"factor": 4.0}}, r"factor 4.0, and transformers 4 takes 8\.0"),
        ({"rope_scaling": ROPE | {"original_max_position_embeddings": 64}}, "64, and transformers 4 takes 32"),
        ({"original_max_position_embeddings": 1}, "the nearest length that longrope has is 2"),
    ],
)
def test_refused(own, message):
    with pytest.raises(InputError, match=message):
        check_host(CONFIG | own, "bridge")
