"""Configs of SmolLM3: its published size, the layers without rotary positions, and what is refused."""

import pytest
from pico import SIZES

from nemo_minitron.errors import InputError
from nemo_minitron.families import family_of, family_of_nemo, from_hf, to_hf, written_config

CONFIG = SIZES | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}


def test_published_size():
    sizes = {"num_hidden_layers": 36, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4}
    sizes |= {"intermediate_size": 11008, "vocab_size": 128_256, "head_dim": 128, "tie_word_embeddings": True}
    assert from_hf(CONFIG | sizes).parameters() == 3_075_098_624


@pytest.mark.parametrize(
    "fields", [{}, {"no_rope_layer_interval": 2}, {"no_rope_layers": [0, 1, 1, 0, 1, 1], "no_rope_layer_interval": 2}]
)
def test_the_layers_without_rotary_positions_are_transformers(fields):
    from transformers import SmolLM3Config

    theirs = SmolLM3Config(**CONFIG | fields).no_rope_layers
    name, found = family_of(CONFIG).nemo_config(CONFIG | fields)
    assert (name, found["no_rope_freq"]) == ("LlamaConfig", [1 - rope for rope in theirs])


def test_they_go_with_the_layers():
    base = CONFIG | {"no_rope_layer_interval": 2}  # 1, 3 and 5 have none
    student = from_hf(base).replace(num_layers=3)
    assert to_hf(student, base, [0, 1, 5])["no_rope_layers"] == [1, 0, 0]
    with pytest.raises(InputError, match="no_rope_layers of this model differ from layer to layer"):
        to_hf(student, base)
    assert "no_rope_layers" not in to_hf(from_hf(base).replace(hidden_size=40), base)


def test_a_nemo_checkpoint_is_a_llama_with_no_rope_freq():
    family, (_, fields) = family_of(CONFIG), family_of(CONFIG).nemo_config(CONFIG)
    assert family_of_nemo("LlamaModel", fields) is family
    assert family_of_nemo("LlamaModel", {}).model_type == "llama"
    assert family.from_nemo(fields)["no_rope_layers"] == [1, 1, 1, 0, 1, 1]
    assert family.from_nemo(fields | {"no_rope_freq": 3})["no_rope_layers"] == [1, 1, 0, 1, 1, 0]


def test_the_tie_is_written_out():
    silent = {name: value for name, value in CONFIG.items() if name != "tie_word_embeddings"}
    assert from_hf(silent).tied_embeddings
    assert written_config(silent)["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"no_rope_layers": [1] * 5}, "no_rope_layers is .* it needs a 0 or 1 for each of its layers"),
        ({"no_rope_layers": [1, 1, 1, 1, 1, 2]}, "no_rope_layers is"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0; it must be at least 1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling 'yarn' is not supported"),
    ],
)
def test_refused_by_name(fields, message):
    with pytest.raises(InputError, match=message):
        family_of(CONFIG).nemo_config(CONFIG | fields)
