"""What Megatron-Bridge's provider is told of a scaled rotary embedding, and what is refused; each host by its name."""

import math

import pytest
from pico import SIZES

from nemo_minitron.errors import InputError
from nemo_minitron.families import check_host, family_of
from nemo_minitron.families.bridge import bridge_fields, hf_yarn

CLASSES = {"arcee": "Arcee", "llama": "Llama", "nemotron": "Nemotron", "phi3": "Phi3", "qwen2": "Qwen2"}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def config(kind, rope=None):
    return SIZES | {"model_type": kind, "architectures": [f"{CLASSES[kind]}ForCausalLM"], "rope_scaling": rope}


def fields(kind, rope):
    base = config(kind, rope)
    return bridge_fields(family_of(base), base)


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"original_max_position_embeddings": 64, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"mscale": 0.7, "mscale_all_dim": 0.3},
        {"mscale": 0.7},
        {"attention_factor": 0.1 * math.log(4) + 1},
    ],
)
def test_yarn_is_transformers(own):
    """The factor of queries and keys, and the numbers of the frequencies."""
    from transformers import Qwen2Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found, theirs = fields("qwen2", YARN | own), Qwen2Config(**config("qwen2", YARN | own))
    scale = [0.1 * found[name] * math.log(4) + 1 for name in ("yarn_mscale", "yarn_mscale_all_dim")]
    assert scale[0] / scale[1] == pytest.approx(ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")[1], rel=1e-12)
    assert found["yarn_original_max_position_embeddings"] == own.get("original_max_position_embeddings", 256)
    assert (found["yarn_beta_fast"], found["yarn_beta_slow"]) == (own.get("beta_fast", 32), own.get("beta_slow", 1))
    assert found["yarn_correction_range_round_to_int"] is own.get("truncate", True)
    assert (found["position_embedding_type"], found["yarn_rotary_scaling_factor"]) == ("yarn", 4.0)


@pytest.mark.parametrize("own", [{}, {"beta_fast": 16, "truncate": False}, {"mscale": 0.7, "mscale_all_dim": 0.3}])
def test_a_checkpoint_by_yarn_is_the_config_again(own):
    base = config("qwen2", YARN | own)
    given, family = fields("qwen2", YARN | own), family_of(base)
    found = family.from_nemo(given | {"position_embedding_type": "rope"}) | hf_yarn(given)
    assert bridge_fields(family, found) == given
    assert hf_yarn(fields("qwen2", None)) == {}
    with pytest.raises(InputError, match=r"yarn_mscale is 0\.5 and its yarn_mscale_all_dim 0"):
        hf_yarn(given | {"yarn_mscale": 0.5, "yarn_mscale_all_dim": 0.0})


def test_llama3_is_megatrons_own():
    assert (fields("llama", LLAMA3)["rope_scaling"], fields("llama", LLAMA3)["rope_scaling_factor"]) == (True, 32.0)
    assert "old_context_len" not in fields("llama", LLAMA3)
    assert fields("llama", None)["rope_scaling"] is False


@pytest.mark.parametrize(
    ("kind", "rope", "message"),
    [
        ("llama", LLAMA3 | {"low_freq_factor": 2.0}, "low_freq_factor 2.0, and Megatron-Bridge's is always 1.0; give"),
        ("llama", LLAMA3 | {"original_max_position_embeddings": 4096}, "old_context_len 4096, and"),
        ("qwen2", YARN | {"attention_factor": 1.5}, "attention_factor 1.5, and Megatron-core computes 1.138"),
        ("qwen2", {"rope_type": "yarn"}, "rope_scaling has no 'factor'"),
        ("qwen2", YARN | {"factor": math.nan}, "'rope_scaling.factor' is nan"),
        ("nemotron", YARN, "rope_scaling 'yarn' is not supported"),
        ("phi3", YARN, "rope_scaling 'yarn' is not supported"),
        ("qwen2", {"rope_type": "longrope", "factor": 4.0}, "rope_scaling 'longrope' is not supported"),
    ],
)
def test_refused_on_bridge(kind, rope, message):
    with pytest.raises(InputError, match=message):
        check_host(config(kind, rope), "bridge")


@pytest.mark.parametrize("kind", ["arcee", "llama", "qwen2"])
def test_nemo_refuses_yarn_and_names_the_host_that_has_it(kind):
    check_host(config(kind, YARN), "bridge")
    with pytest.raises(InputError, match=r"'yarn' is not supported by NeMo's .*; Megatron-Bridge has it: give"):
        check_host(config(kind, YARN), "nemo")
