"""Configs of Granite: published sizes, its four multipliers in Megatron's fields, and NeMo's refusal."""

import math

import pytest
from pico import SIZES

from nemo_minitron.errors import InputError
from nemo_minitron.families import (
    check_host,
    family_of,
    family_of_fields,
    family_of_nemo,
    from_hf,
    to_hf,
    written_config,
)
from nemo_minitron.families.bridge import bridge_fields

MULTIPLIERS = {"attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 8.0}
MULTIPLIERS |= {"residual_multiplier": 0.22}
CONFIG = SIZES | MULTIPLIERS | {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
# hidden, ffn -> transformers' count of the published sizes: granite-3.0-2b and 3.0-8b
PUBLISHED = [((2048, 8192), 2_533_531_648), ((4096, 12_800), 8_170_848_256)]


@pytest.mark.parametrize(("sizes", "count"), PUBLISHED)
def test_published_sizes(sizes, count):
    fields = {"hidden_size": sizes[0], "intermediate_size": sizes[1], "num_hidden_layers": 40, "vocab_size": 49_155}
    fields |= {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True, "head_dim": None}
    assert from_hf(CONFIG | fields).parameters() == count


def test_the_multipliers_in_megatrons_fields():
    found = bridge_fields(family_of(CONFIG), CONFIG)
    assert (found["softmax_scale"], found["mup_output_mult"]) == (0.015625, 0.125)
    assert found["mup_embedding_mult"] == pytest.approx(12 / 0.22, rel=1e-15)
    assert found["layernorm_epsilon"] == pytest.approx(3e-5 / 0.22**2, rel=1e-15)
    assert (found["use_mup"], found["mup_base_hidden_size"]) == (True, 48)


def test_where_a_config_is_silent_all_are_one():
    silent = {name: value for name, value in CONFIG.items() if name not in MULTIPLIERS}
    found = bridge_fields(family_of(silent), silent)
    assert (found["softmax_scale"], found["mup_embedding_mult"], found["mup_output_mult"]) == (1, 1, 1)
    assert found["layernorm_epsilon"] == 3e-5


def test_a_checkpoint_is_the_same_model():
    """The residual multiplier is 1 in it, and its numbers in Megatron's fields are the same."""
    given = bridge_fields(family_of(CONFIG), CONFIG | {"logits_scaling": 0.3})
    family = family_of_fields(given | {"max_position_embeddings": 256})
    assert family.model_type == "granite"
    found = family.from_nemo(given)
    again = bridge_fields(family, found)
    assert again.pop("mup_output_mult") == pytest.approx(given.pop("mup_output_mult"), rel=1e-15)
    assert again == given
    with pytest.raises(InputError, match="mup_base_hidden_size is 32; a GraniteForCausalLM needs its hidden_size, 48"):
        family.from_nemo(given | {"mup_base_hidden_size": 32})


def test_a_student_keeps_the_multipliers():
    written = written_config(to_hf(from_hf(CONFIG).replace(hidden_size=40, num_layers=4), CONFIG, [0, 1, 2, 5]))
    assert {name: written[name] for name in MULTIPLIERS} == MULTIPLIERS
    assert bridge_fields(family_of(written), written)["mup_base_hidden_size"] == 40


def test_nemo_refuses_it_and_names_the_host_that_has_it():
    check_host(CONFIG, "bridge")
    with pytest.raises(InputError, match="which a GraniteForCausalLM has; Megatron-Bridge's has them: give --host"):
        check_host(CONFIG, "nemo")
    assert family_of_nemo("LlamaModel", {}).model_type == "llama"


@pytest.mark.parametrize("name", sorted(MULTIPLIERS))
@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, "12"])
def test_a_multiplier_that_no_model_has_is_refused(name, bad):
    with pytest.raises(InputError, match=f"the config's '{name}' is"):
        check_host(CONFIG | {name: bad}, "bridge")
