"""Numbers of a config that no model has, refused by their key, of every family and in nested groups."""

import json

import pytest
from pico import SIZES

from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf

CONFIG = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MIXTRAL = SIZES | {"num_local_experts": 5, "num_experts_per_tok": 3, "model_type": "mixtral"}
MIXTRAL |= {"architectures": ["MixtralForCausalLM"]}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rms_norm_eps": 1e300}, "'rms_norm_eps' is 1e\\+300; it must be a number from 0 to 0.1"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan; it must be a finite number"),
        ({"rms_norm_eps": -1e-5}, "'rms_norm_eps' is -1e-05"),
        ({"rms_norm_eps": "1e-5"}, "'rms_norm_eps' is '1e-5'"),
        ({"rms_norm_eps": True}, "'rms_norm_eps' is True"),
        ({"rope_theta": 0}, "'rope_theta' is 0; it must be a number from 1 to 1e\\+15"),
        ({"rope_theta": float("inf")}, "'rope_theta' is inf"),
        ({"initializer_range": -0.02}, "'initializer_range' is -0.02"),
        ({"max_position_embeddings": 10**400}, "'max_position_embeddings' is a whole number of 1329 bits"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "'rope_scaling.factor' is nan"),
        ({"rope_parameters": {"full": {"rope_theta": -1.0}}}, "rope_theta is -1.0"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0, float("inf")]}}, "long_factor' is inf"),
        ({"anything": float("-inf")}, "'anything' is -inf; it must be a finite number"),
    ],
)  # fmt: skip
def test_refused_by_its_key(changed, words):
    with pytest.raises(InputError, match=words):
        from_hf(CONFIG | changed)


def test_of_a_mixture_too():
    with pytest.raises(InputError, match="'router_aux_loss_coef' is nan"):
        from_hf(MIXTRAL | {"router_aux_loss_coef": float("nan")})


def test_from_a_file_in_which_python_reads_nan(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"rms_norm_eps": float("inf")}))
    with pytest.raises(InputError, match="'rms_norm_eps' is inf"):
        from_hf(tmp_path)


def test_what_models_have_is_legal():
    legal = {"rms_norm_eps": 1e-12, "rope_theta": 1e9, "initializer_range": 0, "sliding_window": None, "extra": 1e300}
    assert from_hf(CONFIG | legal) == from_hf(CONFIG)
