"""Windows in some layers: which ones they are, by transformers; in NeMo's config and back; published sizes."""

import pytest
from pico import SIZES

from nemo_minitron.families import family_of, family_of_nemo, from_hf, to_hf

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
CLASSES = {"ministral": "MinistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
CLASSES |= {"smollm3": "SmolLM3ForCausalLM"}
LISTED = {"layer_types": [FULL, SLIDING, FULL, SLIDING, SLIDING, FULL]}
CASES = [
    ("ministral", {"sliding_window": 8} | LISTED),
    ("ministral", {"sliding_window": 8}),
    ("ministral", {"sliding_window": None}),
    *((kind, WINDOW | fields) for kind in ("qwen2", "qwen3") for fields in ({"max_window_layers": 4}, LISTED)),
    *(("qwen2", WINDOW | {"max_window_layers": first}) for first in (0, 6, 9)),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2}),
    ("smollm3", WINDOW | {"no_rope_layer_interval": 2}),
    ("smollm3", WINDOW | {"no_rope_layer_interval": 3} | LISTED),
    ("smollm3", {"use_sliding_window": False, "sliding_window": 8}),
]


def config(kind, **fields):
    return SIZES | {"model_type": kind, "architectures": [CLASSES[kind]]} | fields


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_the_windows_are_transformers(kind, fields):
    """Layer by layer, what the NeMo fields say equals what transformers' attention modules have."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    base = config(kind, **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**base | {"pad_token_id": None}))
    theirs = [layer.self_attn.sliding_window for layer in model.model.layers]
    _, found = family_of(base).nemo_config(base)
    window = found["window_size"]
    skip = found.get("window_attn_skip_freq") or [1] * 6
    assert theirs == [window[0] + 1 if window and windowed else None for windowed in skip]
    counted = from_hf(base)
    windows = counted.window_attn_skip_freq or [1] * 6
    assert theirs == [counted.attention_window if windowed else None for windowed in windows]


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_a_nemo_checkpoint_has_the_same_windows(kind, fields):
    base = config(kind, **fields)
    family = family_of(base)
    name, given = family.nemo_config(base)
    found = family.from_nemo(given)
    assert family_of_nemo(family.nemo_model, given) is family
    assert family.nemo_config(found) == (name, given)


def test_megatrons_number_for_every_nth_layer():
    """N: every N-th layer has no window."""
    base = config("qwen2", **WINDOW)
    _, given = family_of(base).nemo_config(base)
    found = family_of(base).from_nemo(given | {"window_size": [7, 0], "window_attn_skip_freq": 3})
    assert found["layer_types"] == [SLIDING, SLIDING, FULL] * 2
    assert (found["sliding_window"], found["max_window_layers"], found["use_sliding_window"]) == (8, 0, True)


@pytest.mark.parametrize("kind", CLASSES)
def test_windows_go_with_the_layers(kind):
    base = config(kind, **({"sliding_window": 8} if kind == "ministral" else WINDOW), **LISTED)
    cut = to_hf(from_hf(base).replace(num_layers=3), base, [0, 1, 4])
    assert cut["layer_types"] == [FULL, SLIDING, SLIDING]
    assert family_of(cut).nemo_config(cut)[1]["window_attn_skip_freq"] == [0, 1, 1]


def test_published_sizes():
    """Ministral-8B-Instruct-2410 and Qwen2-72B, whose last layers its config would give a window."""
    sizes = {"num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    sizes |= {"intermediate_size": 12_288, "vocab_size": 131_072, "head_dim": 128, "sliding_window": 32_768}
    ministral = config("ministral", **sizes, layer_types=[FULL, SLIDING, SLIDING, SLIDING] * 9)
    assert from_hf(ministral).parameters() == 8_019_808_256
    sizes = {"num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8}
    sizes |= {"intermediate_size": 29_568, "vocab_size": 152_064, "head_dim": 128, "max_window_layers": 80}
    assert from_hf(config("qwen2", **sizes)).parameters() == 72_706_203_648
