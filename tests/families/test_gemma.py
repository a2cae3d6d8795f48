"""Configs of Gemma 2 and 3: published sizes, their fields of Megatron, what is refused, and the cut of hidden channels.

The published configs are written down from memory; transformers' own model of each, on the meta device, has the counts.
"""

import contract
import numpy as np
import pytest
from contract import FULL, SLIDING
from pico import SIZES, raw_tensors
from tolerances import LOGITS_PICO_FP32

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.costs import activations
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.model import load
from nemo_minitron.families import (
    check_host,
    family_of,
    family_of_fields,
    from_hf,
    read_config,
    to_hf,
    written_config,
)
from nemo_minitron.families.bridge import bridge_fields
from nemo_minitron.pruning import prune
from nemo_minitron.settings.layout import Layout

GEMMA2 = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
PICO2, PICO3 = SIZES | GEMMA2, SIZES | GEMMA3 | {"sliding_window": 8}
SIZE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
PUBLISHED = [
    (GEMMA2, (26, 2304, 9216, 8, 4), 256_000, 2_614_341_888),  # gemma-2-2b
    (GEMMA2, (42, 3584, 14_336, 16, 8), 256_000, 9_241_705_984),  # gemma-2-9b
    (GEMMA3, (18, 640, 2048, 4, 1), 262_144, 268_098_176),  # gemma-3-270m
    (GEMMA3, (26, 1152, 6912, 4, 1), 262_144, 999_885_952),  # gemma-3-1b
]


@pytest.mark.parametrize(("kind", "sizes", "vocab", "count"), PUBLISHED)
def test_published_sizes(kind, sizes, vocab, count):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = kind | dict(zip(SIZE, sizes, strict=True)) | {"vocab_size": vocab, "head_dim": 256}
    assert from_hf(config).parameters() == count
    fields = {name: value for name, value in config.items() if name not in ("architectures", "model_type")}
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind["model_type"], **fields))
    assert theirs.num_parameters() == count


def test_costs_count_windows():
    """gemma-3-1b: 22 of 26 layers keep 512 tokens of 32,768, one group of 256 channels each."""
    model = from_hf(GEMMA3 | dict(zip(SIZE, (26, 1152, 6912, 4, 1), strict=True)) | {"sliding_window": 512})
    assert model.window_attn_skip_freq.count(0) == 4
    whole, windowed = (one.memory(batch=1, context=32_768) for one in (model.replace(attention_window=None), model))
    assert whole - windowed == 2 * 256 * 2 * 22 * (32_768 - 512)


def test_activations_count_what_capped_attention_keeps():
    """And the inputs of the norms behind attention and MLP."""
    model, fields = from_hf(PICO2), {"batch": 1, "context": 100, "logits": 0}
    plain = model.replace(post_norms=False, capped_attention=False)
    (more,) = (a - b for a, b in zip(*(activations(one, Layout(), **fields) for one in (model, plain)), strict=True))
    assert more == 2 * 100 * 6 * (2 * 48 + 4 * 100 * 6)  # bytes, tokens, layers
    selective = fields | {"recompute": "selective"}
    (more,) = (a - b for a, b in zip(*(activations(one, Layout(), **selective) for one in (model, plain)), strict=True))
    assert more == 2 * 100 * 6 * 2 * 48


# -- fields ------------------------------------------------------------------------------------------------------
def test_the_fields_of_gemma_2():
    found = bridge_fields(family_of(PICO2), PICO2 | {"query_pre_attn_scalar": 144})
    assert found["softmax_scale"] == pytest.approx(1 / 12, rel=1e-15)
    assert (found["attn_logit_softcapping"], found["final_logit_softcapping"]) == (50.0, 30.0)
    assert (found["window_size"], found["window_attn_skip_freq"]) == ([4095, 0], [1, 0, 1, 0, 1, 0])
    assert (found["rotary_base_local"], found["layernorm_zero_centered_gamma"]) == (None, True)
    assert from_hf(PICO2).tied_embeddings is False  # as it says
    assert from_hf({n: v for n, v in PICO2.items() if n != "tie_word_embeddings"}).tied_embeddings  # its default


def test_the_fields_of_gemma_3():
    found = bridge_fields(family_of(PICO3), PICO3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert (found["rotary_base"], found["rotary_base_local"], found["seq_len_interpolation_factor"]) == (5000, 1e4, 8)
    assert (found["window_size"], found["window_attn_skip_freq"]) == ([7, 0], [1, 1, 1, 1, 1, 0])
    assert (found["attn_logit_softcapping"], found["qk_layernorm"], found["softmax_scale"]) == (None, True, 1 / 16)
    other = PICO3 | {"sliding_window_pattern": 2}
    assert bridge_fields(family_of(other), other)["window_attn_skip_freq"] == [1, 0, 1, 0, 1, 0]


UNCAPPED = PICO2 | {"attn_logit_softcapping": None}


@pytest.mark.parametrize("config", [PICO2, UNCAPPED, PICO3], ids=["2", "2-uncapped", "3"])
def test_a_checkpoint_is_the_same_model(config):
    given = bridge_fields(family_of(config), config | {"query_pre_attn_scalar": 168})
    family = family_of_fields(given | {"max_position_embeddings": 256})
    assert family.model_type == config["model_type"]
    found = family.from_nemo(given)
    assert found["query_pre_attn_scalar"] == 168  # transformers 5 refuses 168.00000000000003
    assert isinstance(found["query_pre_attn_scalar"], int)
    assert bridge_fields(family, found) == given


def test_the_layers_of_a_student_keep_their_windows():
    """Gemma's pattern would shift, so the student's config lists them; the key of the pattern is not read then."""
    student = to_hf(from_hf(PICO3).keep_layers([0, 3, 5]), PICO3, [0, 3, 5])
    assert student["layer_types"] == [SLIDING, SLIDING, FULL]
    assert bridge_fields(family_of(student), student)["window_attn_skip_freq"] == [1, 1, 0]
    with pytest.raises(InputError, match=r"differ from layer to layer, .* cut to 3 before it is known which ones stay"):
        to_hf(from_hf(PICO3).replace(num_layers=3), PICO3)


# -- transformers 5's form ---------------------------------------------------------------------------------------
def test_two_bases_in_the_form_of_either_version():
    written = written_config(PICO3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert written["rope_local_base_freq"] == 1e4
    assert written["rope_parameters"] == {
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    }
    assert read_config(written)["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rope_theta": 1e6}, "rope_parameters has rope_theta; it needs a mapping for full_attention and one for"),
        ({SLIDING: {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.sliding_attention is .* type 'default'"),
        ({SLIDING: {"rope_theta": 2e4}}, r"rope_local_base_freq is 10000.0 and its .*rope_theta is 20000"),
        ({FULL: {"rope_theta": 2e6}}, "rope_theta is 5000.0 and its rope_parameters.rope_theta is 2000000"),
        ({FULL: 3}, "rope_parameters.full_attention is 3; it must be a mapping or null"),
    ],
)
def test_bases_that_contradict_each_other_are_refused(parameters, words):
    with pytest.raises(InputError, match=words):
        from_hf(PICO3 | {"rope_local_base_freq": 1e4, "rope_parameters": parameters})


# -- refusals ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (PICO2, "attention_bias", True), (PICO2, "use_bidirectional_attention", True),
        (PICO3, "attention_bias", True), (PICO3, "use_bidirectional_attention", True),
        (PICO3, "attn_logit_softcapping", 50.0), (PICO3, "final_logit_softcapping", 30.0),
        (PICO3, "sliding_window_pattern", 0), (PICO2, "query_pre_attn_scalar", 0),
        (PICO2, "final_logit_softcapping", -1),
        (PICO2, "attn_logit_softcapping", "50"), (PICO3, "rope_local_base_freq", 0.5),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(config, key, value):
    with pytest.raises(InputError, match=f"the config's '?{key}'? is {value!r}"):
        from_hf(config | {key: value})


@pytest.mark.parametrize("config", [PICO2, PICO3], ids=["2", "3"])
def test_another_scaling_is_refused_on_bridge_too(config):
    for kind in ("yarn", "llama3", "longrope"):
        words = f"rope_scaling '{kind}' is not supported for a .*; legal are default, linear"
        with pytest.raises(InputError, match=words):
            check_host(config | {"rope_scaling": {"rope_type": kind, "factor": 2.0}}, "bridge")


@pytest.mark.parametrize("config", [PICO2, PICO3], ids=["2", "3"])
def test_nemo_refuses_it_and_names_the_host_that_has_it(config):
    check_host(config, "bridge")
    with pytest.raises(InputError, match=r"NeMo 2 builds no Gemma.* Megatron-Bridge does: give --host bridge"):
        check_host(config, "nemo")


# -- a cut of hidden channels ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["gemma2-own", "gemma2-other", "gemma3_text-own"])
def test_a_hidden_cut_keeps_the_scale_of_the_embeddings(name, tmp_path):
    """The student's logits are those of the plain slices with the teacher's multiplier, tied or not."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    teacher, keep = contract.make(tmp_path / "t", name), contract.nothing() | {"hidden": list(range(0, 48, 2))}
    student = prune(teacher, contract.plan_of(from_hf(teacher), keep), tmp_path / "s")
    config = AutoConfig.from_pretrained(teacher)
    config.hidden_size = 24
    plain = AutoModelForCausalLM.from_config(config).eval()
    sliced = contract.slice_by_hand(raw_tensors(teacher), keep)
    state = {hf: torch.from_numpy(bits.view(np.float32).copy()) for hf, bits in sliced.items()}
    plain.load_state_dict(state, strict=not config.tie_word_embeddings)
    tokens = torch.arange(3, 67)[None] * 13 % 509
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(student)(tokens).logits
        other = plain(tokens).logits
        if hasattr(plain.model.embed_tokens, "embed_scale"):
            plain.model.embed_tokens.embed_scale.fill_(48**0.5)
        else:  # transformers 4's Gemma 2 takes it from the config in each pass
            plain.model.config.hidden_size = 48
        expected = plain(tokens).logits
    assert (other - expected).abs().max() > 0.01  # the multiplier counts
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS_PICO_FP32)


def test_nothing_is_rescaled_without_a_hidden_cut(tmp_path):
    teacher = contract.make(tmp_path / "t", "gemma3_text-own", dtype="bfloat16")
    source = from_hf(teacher)
    plan = PrunePlan(source, source.keep_layers([0, 2, 3]), {"layers": [0, 2, 3]})
    before, after = raw_tensors(teacher), raw_tensors(prune(teacher, plan, tmp_path / "s"))
    for tensor in ("model.embed_tokens.weight", "model.norm.weight"):
        np.testing.assert_array_equal(after[tensor], before[tensor])


def test_evaluation_caps_the_scores(tmp_path):
    """transformers' default attention would leave the cap out."""
    assert load(contract.make(tmp_path / "2", "gemma2-own"), "fp32").config._attn_implementation == "eager"
    assert load(contract.make(tmp_path / "2-other", "gemma2-other"), "fp32").config._attn_implementation == "sdpa"
    assert load(contract.make(tmp_path / "3", "gemma3_text-own"), "fp32").config._attn_implementation == "sdpa"
