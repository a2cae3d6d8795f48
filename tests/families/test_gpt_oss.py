"""Configs of gpt-oss: published sizes and keys, Megatron's fields, checkpoints of Bridge, and NeMo's refusal.

The published configs are written from memory, since nothing can be downloaded here; the counts are the published ones.
"""

import numpy as np
import pytest
from pico import SIZES

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.files import write_json
from nemo_minitron.errors import InputError
from nemo_minitron.export import serving_commands
from nemo_minitron.families import check_host, family_of, family_of_fields, from_hf, remarks, to_hf, written_config
from nemo_minitron.families.bridge import bridge_fields
from nemo_minitron.families.gpt_oss import YARN
from nemo_minitron.families.keys import FULL, SLIDING
from nemo_minitron.pruning.compensation import check_residual
from nemo_minitron.settings.layout import Layout
from nemo_minitron.sources.bridge_config import config_of_model

PUBLISHED = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880, "layer_types": [SLIDING, FULL] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
    "pad_token_id": 199999, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "rms_norm_eps": 1e-05, "rope_scaling": YARN, "rope_theta": 150000, "router_aux_loss_coef": 0.9,
    "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 201088,
}  # fmt: skip
LARGE = PUBLISHED | {"num_hidden_layers": 36, "num_local_experts": 128, "layer_types": [SLIDING, FULL] * 18}
CONFIG = SIZES | {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_local_experts": 4}


@pytest.mark.parametrize(
    ("config", "count", "active"), [(PUBLISHED, 20_914_757_184, 3.61e9), (LARGE, 116_829_156_672, 5.13e9)]
)
def test_published_counts(config, count, active):
    """Active parameters are published without the input embedding."""
    source = from_hf(config)
    assert source.parameters() == count
    assert source.parameters(active=True) - 201_088 * 2880 == pytest.approx(active, rel=1e-3)
    keys = 2 * 2 * 8 * 64 * (source.num_layers // 2)  # bytes of keys and values of a token in half the layers
    assert source.memory(batch=1, context=8192) == 2 * count + keys * (8192 + 128)
    seen = 4 * 64 * 64 * (source.num_layers // 2)  # of scores and values, for each token that is seen
    assert source.flops_per_token(8192) - source.flops_per_token(1) == seen * (8191 + 127)
    assert remarks(config) == []


def test_megatrons_fields():
    found = bridge_fields(family_of(PUBLISHED), PUBLISHED)
    wanted = {
        "softmax_type": "learnable", "glu_linear_offset": 1.0, "activation_func_clamp_value": 7.0,
        "add_bias_linear": True, "add_qkv_bias": False, "moe_router_pre_softmax": False, "window_size": [127, 0],
        "window_attn_skip_freq": [1, 0] * 12, "position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 32.0,
        "yarn_original_max_position_embeddings": 4096, "yarn_correction_range_round_to_int": False,
        "moe_aux_loss_coeff": 0.9, "moe_router_load_balancing_type": "aux_loss", "rotary_base": 150000,
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted


def test_a_silent_config_is_what_transformers_says():
    """YaRN by 32 and windows in the even layers; a student's config says both, to both versions."""
    silent = {name: value for name, value in PUBLISHED.items() if name not in ("layer_types", "rope_scaling")}
    assert bridge_fields(family_of(silent), silent) == bridge_fields(family_of(PUBLISHED), PUBLISHED)
    assert from_hf(silent).window_attn_skip_freq == (1, 0) * 12
    written = written_config(to_hf(from_hf(silent).keep_layers([0, 2, 3]), silent, [0, 2, 3]))
    assert written["layer_types"] == [SLIDING, SLIDING, FULL]
    assert written["rope_scaling"] == YARN
    assert written["rope_parameters"] == YARN | {"rope_theta": 150000}


def test_plain_positions_stay_plain():
    plain = CONFIG | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    plain.pop("rope_theta")
    written = written_config(to_hf(from_hf(plain), plain))
    assert (written["rope_scaling"], written["rope_parameters"]["rope_type"]) == (None, "default")
    found = bridge_fields(family_of(written), written)
    assert (found["position_embedding_type"], found["yarn_rotary_scaling_factor"]) == ("rope", None)


def test_windows_in_all_layers_are_said():
    """Bridge's own provider would leave every second one out."""
    every = bridge_fields(family_of(CONFIG), CONFIG | {"layer_types": [SLIDING] * 6})
    none = bridge_fields(family_of(CONFIG), CONFIG | {"layer_types": [FULL] * 6})
    assert (every["window_size"], every["window_attn_skip_freq"]) == ([127, 0], None)
    assert (none["window_size"], none["window_attn_skip_freq"]) == (None, None)


def test_a_students_config():
    source = from_hf(PUBLISHED)
    student = to_hf(source.replace(num_moe_experts=16, moe_router_topk=2, hidden_size=2048), PUBLISHED)
    assert "quantization_config" not in student
    assert (student["experts_per_token"], student["num_experts_per_tok"], student["num_local_experts"]) == (2, 2, 16)
    assert from_hf(student).moe_router_topk == 2
    assert student["initial_context_length"] == 4096


def test_a_checkpoint_of_bridge_is_the_same_model():
    fields = bridge_fields(family_of(PUBLISHED), PUBLISHED)
    assert family_of_fields(
        fields | {"position_embedding_type": "rope", "activation_func": "x.quick_gelu"}
    ) is family_of(PUBLISHED)
    model = fields | {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider", "vocab_size": 201_088,
        "activation_func": "megatron.core.fusions.fused_bias_geglu.quick_gelu", "seq_length": 131072,
    }  # fmt: skip
    found = config_of_model(model)
    assert from_hf(found).as_dict() == from_hf(PUBLISHED).as_dict()
    assert bridge_fields(family_of(found), found) == fields
    with pytest.raises(InputError, match="no supported family has a model with these fields"):
        config_of_model(model | {"glu_linear_offset": 0.0})
    with pytest.raises(InputError, match="no supported family has a model with these fields"):
        config_of_model(model | {"activation_func": "torch.nn.functional.silu"})


def test_nemo_refuses_it_and_names_the_host_that_has_it():
    check_host(PUBLISHED, "bridge")
    with pytest.raises(
        InputError, match=r"a GptOssForCausalLM is not built with NeMo's classes here, .*: give --host br"
    ):
        check_host(PUBLISHED, "nemo")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"swiglu_limit": 5.0}, r"swiglu_limit is 5\.0; a GptOssForCausalLM of its other keys has 7\.0"),
        ({"experts_per_token": 8}, "experts_per_token is 8; a GptOssForCausalLM of its other keys has 4"),
        ({"initial_context_length": 8192}, "initial_context_length is 8192; .* has 4096"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8'; legal is 'mxfp4', or none"),
        ({"num_experts_per_tok": 1, "experts_per_token": 1}, "the nearest legal num_experts_per_tok is 2"),
        ({"attention_bias": False}, "this GptOssForCausalLM has them in the MLP alone"),
        ({"sliding_window": None}, "gives layers 'sliding_attention', and no sliding_window is in use"),
        ({"layer_types": [FULL] * 23}, "it needs one word for each of 24 layers"),
        ({"num_experts_per_tok": 33, "experts_per_token": None}, "moe_router_topk is 33 of 32 experts"),
    ],
)
def test_refused_by_name(fields, message):
    with pytest.raises(InputError, match=message):
        check_host(PUBLISHED | fields, "bridge")


def test_serving(tmp_path):
    write_json(tmp_path / "config.json", PUBLISHED)
    assert serving_commands(tmp_path, tp=8)["vllm"][0].endswith("--dtype bfloat16 --tensor-parallel-size 8")
    with pytest.raises(InputError, match="no engine is known to serve experts with biases in fp8; legal is bf16"):
        serving_commands(tmp_path, precision="fp8")


def test_layouts():
    """Megatron adds an expert's bias on each rank that has a part of the expert."""
    Layout(tp=2, etp=1, sp=True).check(from_hf(PUBLISHED))
    with pytest.raises(InputError, match=r"experts with biases are whole, not split in 2; set etp=1 \(--etp 1\)"):
        Layout(tp=2, sp=True).check(from_hf(PUBLISHED))


def test_heads_with_sinks_have_no_residual():
    source = from_hf(PUBLISHED)
    with pytest.raises(InputError, match="a head residual is not defined for heads with attention sinks"):
        check_residual(source, source.replace(num_attention_heads=48), "paper")


def test_plain_values():
    source = from_hf(PUBLISHED)
    assert Architecture.from_dict(source.as_dict()) == source
    assert {"attention_sinks", "moe_router_bias"} <= source.as_dict().keys()
    other = from_hf(CONFIG | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    assert not {"attention_sinks", "moe_router_bias"} & other.as_dict().keys()  # files of other models stay
    assert np.prod(source.shapes()["layers.23.experts.31.gate.bias"]) == 2880


@pytest.mark.parametrize(("asked", "coefficient"), [(False, 0.0), (True, 0.9), (None, 0.0)])
def test_a_training_on_text_has_the_routers_loss_only_if_the_config_asks_for_it(asked, coefficient):
    """As in transformers. Other mixtures have the coefficient of their config, as on their hosts."""
    assert family_of(PUBLISHED).routers_loss(PUBLISHED | {"output_router_logits": asked}) == coefficient
    other = {"model_type": "mixtral", "router_aux_loss_coef": 0.02}
    assert family_of(other).routers_loss(other) == 0.02
    assert family_of({"model_type": "llama"}).routers_loss({"model_type": "llama"}) == 0.0
