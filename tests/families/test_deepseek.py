"""Configs of DeepSeek V2 and V3: published sizes and keys, Megatron's fields, checkpoints of Bridge, and refusals.

The published configs are written from memory, since nothing can be downloaded here. The count of V2-Lite is the
published one; that of Moonlight is this file's own arithmetic.
"""

import pytest

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.files import write_json
from nemo_minitron.errors import InputError
from nemo_minitron.export import serving_commands
from nemo_minitron.families import check_host, family_of, from_hf, multiples_of, remarks, to_hf, written_config
from nemo_minitron.families.bridge import bridge_fields
from nemo_minitron.precisions import FP8
from nemo_minitron.pruning.compensation import check_residual
from nemo_minitron.search.space import make_space
from nemo_minitron.settings.fp8 import check_fp8
from nemo_minitron.settings.layout import Layout
from nemo_minitron.sources.bridge_config import config_of_model

LITE = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 1.0,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy",
    "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
MOONLIGHT = {name: value for name, value in LITE.items() if name != "pretraining_tp"} | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "bos_token_id": 163584, "ep_size": 1,
    "eos_token_id": 163585, "intermediate_size": 11264, "max_position_embeddings": 8192, "norm_topk_prob": True,
    "num_nextn_predict_layers": 0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "vocab_size": 163840,
}  # fmt: skip
GROUPS = MOONLIGHT | {"n_group": 8, "topk_group": 3, "q_lora_rank": 1536}
BOTH = pytest.mark.parametrize("config", [LITE, MOONLIGHT], ids=["lite", "moonlight"])


def by_hand(config):
    """Parameters, summed by the config's own names; V3's correction biases are among them, as in its folder."""
    c, hidden = config, config["hidden_size"]
    heads, rope, latent = c["num_attention_heads"], c["qk_rope_head_dim"], c["kv_lora_rank"]
    attention = hidden * heads * (c["qk_nope_head_dim"] + rope) + hidden * (latent + rope) + latent
    attention += latent * heads * (c["qk_nope_head_dim"] + c["v_head_dim"]) + heads * c["v_head_dim"] * hidden
    expert = 3 * hidden * c["moe_intermediate_size"]
    mixture = (c["n_routed_experts"] + c["n_shared_experts"]) * expert + c["n_routed_experts"] * hidden
    mixture += c["n_routed_experts"] if c["scoring_func"] == "sigmoid" else 0
    dense, layers = c["first_k_dense_replace"], c["num_hidden_layers"]
    mlps = dense * 3 * hidden * c["intermediate_size"] + (layers - dense) * mixture
    return layers * (attention + 2 * hidden) + mlps + 2 * c["vocab_size"] * hidden + hidden


@pytest.mark.parametrize(("config", "count"), [(LITE, 15_706_484_224), (MOONLIGHT, 15_960_110_208)])
def test_published_counts(config, count):
    source = from_hf(config)
    assert source.parameters() == by_hand(config) == count
    assert remarks(config) == []
    assert source.as_dict().keys() & {"q_lora_rank", "moe_router_num_groups"} == set()
    assert Architecture.from_dict(source.as_dict()) == source


@BOTH
def test_costs(config):
    """The KV cache has the latent and the rotary key of a token in each layer; scores have 192 channels, values 128."""
    source = from_hf(config)
    assert source.memory(batch=2, context=8192) - source.memory(batch=0, context=8192) == 2 * 8192 * 27 * (512 + 64) * 2
    assert source.flops_per_token(101) - source.flops_per_token(1) == 100 * 27 * 2 * 16 * (192 + 128)
    routed = 26 * 3 * 2048 * 1408
    assert source.parameters() - source.parameters(active=True) == (64 - 6) * routed
    assert source.moe_layers == tuple(range(1, 27))
    assert (source.dense_layers, source.grouped_layers) == ((0,), ())


def test_megatrons_fields():
    lite, moonlight = (bridge_fields(family_of(c), c) for c in (LITE, MOONLIGHT))
    wanted = {
        "multi_latent_attention": True, "qk_layernorm": True, "kv_lora_rank": 512, "q_lora_rank": None,
        "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128, "num_query_groups": 16,
        "moe_layer_freq": [0] + [1] * 26, "moe_shared_expert_intermediate_size": 2816, "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": 0.0, "moe_router_bias_update_rate": 0.0, "moe_router_num_groups": None,
    }  # fmt: skip
    assert {name: lite[name] for name in wanted} == {name: moonlight[name] for name in wanted} == wanted
    yarn = {"rope_type": "yarn", "rotary_scaling_factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707}
    router = {"moe_router_score_function": "softmax", "moe_router_pre_softmax": True}
    router |= {"moe_router_enable_expert_bias": False, "moe_router_topk_scaling_factor": 1.0}
    assert {name: lite[name] for name in yarn | router} == yarn | router
    plain = {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale_all_dim": 0.0}
    router = {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False}
    router |= {"moe_router_enable_expert_bias": True, "moe_router_topk_scaling_factor": 2.446}
    assert {name: moonlight[name] for name in plain | router} == plain | router


@pytest.mark.parametrize("config", [LITE, MOONLIGHT, GROUPS], ids=["lite", "moonlight", "groups"])
def test_a_checkpoint_of_bridge_is_the_same_model(config):
    fields = bridge_fields(family_of(config), config)
    model = fields | {
        "_target_": "nemo_minitron.hosts.bridge.deepseek.DeepseekProvider", "vocab_size": config["vocab_size"],
        "transformer_layer_spec": {"_target_": "nemo_minitron.hosts.bridge.deepseek.layer_spec", "_call_": False},
        "activation_func": "torch.nn.functional.silu", "seq_length": 4096,
    }  # fmt: skip
    found = config_of_model(model)
    assert from_hf(found) == from_hf(config)
    again = bridge_fields(family_of(found), found)
    assert {**again, "seq_length": 0} == {**fields, "seq_length": 0}
    theirs = model | {"_target_": "megatron.bridge.models.mla_provider.MLAModelProvider"}
    with pytest.raises(InputError, match="the checkpoint's multi_latent_attention is True; only False is supported"):
        config_of_model(theirs)
    with pytest.raises(InputError, match="no supported family has a model with these fields"):
        config_of_model(model | {"moe_layer_freq": [1, 0, *[1] * 25]})


def test_a_students_config():
    source = from_hf(MOONLIGHT).keep_layers([0, 5, 9]).replace(
        num_attention_heads=12, kv_lora_rank=384, moe_ffn_hidden_size=704, moe_shared_expert_intermediate_size=2112,
        num_moe_experts=48, moe_router_topk=4,
    )  # fmt: skip
    found = to_hf(source, MOONLIGHT, [0, 5, 9])
    wanted = {
        "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_shared_experts": 3, "moe_intermediate_size": 704,
        "num_key_value_heads": 12, "kv_lora_rank": 384, "num_experts_per_tok": 4, "n_routed_experts": 48,
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted
    assert from_hf(written_config(found)) == source
    mixtures = to_hf(from_hf(MOONLIGHT).keep_layers([3, 4]), MOONLIGHT, [3, 4])
    assert (mixtures["first_k_dense_replace"], mixtures["intermediate_size"]) == (0, 11264)


@BOTH
def test_what_a_config_cannot_say_is_refused(config):
    source = from_hf(config)
    with pytest.raises(InputError, match=r"shared_expert_ffn=2816 is no multiple of expert_ffn=1024; .* is 3072"):
        to_hf(source.replace(moe_ffn_hidden_size=1024), config)
    with pytest.raises(InputError, match="the layers that stay are all dense"):
        to_hf(source.keep_layers([0]), config, [0])
    assert multiples_of(config)["moe_shared_expert_intermediate_size"] == "moe_ffn_hidden_size"
    space = make_space(source, lists={"expert_ffn": [704, 1024], "shared_expert_ffn": [1408, 2048]})
    loads = make_space(
        source, bounds={"expert_ffn": (704, 1408), "shared_expert_ffn": (1408, 2816)}, loads=multiples_of(config)
    )
    assert space.combinations == 4
    shapes = next(iter(loads.blocks()))
    assert len(shapes["expert_ffn"])
    assert (shapes["shared_expert_ffn"] % shapes["expert_ffn"] == 0).all()


def test_an_odd_latent_is_refused_for_v2():
    to_hf(from_hf(MOONLIGHT).replace(kv_lora_rank=383), MOONLIGHT)
    with pytest.raises(InputError, match=r"kv_latent=383 is odd, .* the nearest legal kv_latent is 384"):
        to_hf(from_hf(LITE).replace(kv_lora_rank=383), LITE)


def test_nemo_refuses_it_and_names_the_host_that_has_it():
    for config in (LITE, MOONLIGHT):
        check_host(config, "bridge")
        with pytest.raises(InputError, match=r"is not built with NeMo's classes here, .*: give --host bridge"):
            check_host(config, "nemo")


YARN = LITE["rope_scaling"]
REFUSED = [
    (MOONLIGHT, {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1; layers of multi-token prediction are"),
    (LITE, {"norm_topk_prob": True}, r"norm_topk_prob is True; a DeepseekV2ForCausalLM here needs False"),
    (LITE, {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; .* needs 'softmax'"),
    (LITE, {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'; .* needs 'greedy' or 'group_limited_greedy'"),
    (MOONLIGHT, {"topk_method": "greedy"}, "topk_method is 'greedy'; .* needs 'noaux_tc'"),
    (MOONLIGHT, {"norm_topk_prob": False}, "norm_topk_prob is False with num_experts_per_tok 6; Megatron normalizes"),
    (MOONLIGHT, {"num_experts_per_tok": 1}, "norm_topk_prob is True with num_experts_per_tok 1; Megatron normalizes"),
    (MOONLIGHT, {"rope_interleave": False}, "rope_interleave is False; .* needs True"),
    (LITE, {"attention_bias": True}, "attention_bias is True; .* needs False"),
    (LITE, {"moe_layer_freq": 2}, "moe_layer_freq is 2; .* needs 1"),
    (LITE, {"num_key_value_heads": 8}, "num_key_value_heads is 8; each head needs its own key: 16"),
    (LITE, {"first_k_dense_replace": 27}, "first_k_dense_replace is 27 of 27 layers, .* legal number is 26"),
    (LITE, {"n_shared_experts": None}, "n_shared_experts is None; it must be a whole number of at least 1"),
    (LITE, {"qk_nope_head_dim": "x"}, "qk_nope_head_dim is 'x'; it must be a whole number of at least 1"),
    (GROUPS, {"num_experts_per_tok": 4}, "by 1 experts of each, and .* by 2; the nearest legal .* is 6"),
    (GROUPS, {"topk_group": 9}, "n_group=8 groups, topk_group=9 of which have a token's 6, contradict each other"),
    (LITE, {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}, "by 2 experts .* legal .* is 3"),
    (LITE, {"rope_scaling": YARN | {"truncate": False}}, "has truncate False; multi-latent attention needs true"),
    (LITE, {"rope_scaling": YARN | {"mscale": None}}, "which transformers and DeepSeek's code read in two ways"),
    (LITE, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling 'linear' is not supported"),
    (MOONLIGHT, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is .* not supported"),
]


@pytest.mark.parametrize(("base", "fields", "message"), REFUSED)
def test_refused_by_name(base, fields, message):
    check_host(base, "bridge")
    with pytest.raises(InputError, match=message):
        check_host(base | fields, "bridge")


def test_groups_of_one_expert_a_token_are_v2s():
    config = LITE | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 6}
    fields = bridge_fields(family_of(config), config)
    assert (fields["moe_router_num_groups"], fields["moe_router_group_topk"]) == (8, 6)


# -- what stands around it ---------------------------------------------------------------------------------
def test_layouts():
    """TP deals out heads; every rank has the latents."""
    source = from_hf(LITE)
    Layout(tp=16, sp=True, etp=1).check(source)
    with pytest.raises(InputError, match=r"tp=3 does not divide 16 heads and an ffn of 10944; the nearest .* is 2"):
        Layout(tp=3, sp=True).check(source)
    narrow = source.replace(moe_ffn_hidden_size=704, moe_shared_expert_intermediate_size=1411)
    with pytest.raises(InputError, match="moe_shared_expert_intermediate_size is 1411, which 2 ranks cannot divide"):
        Layout(tp=2, sp=True).check(narrow)
    with pytest.raises(InputError, match=r"moe_ffn_hidden_size is 705, which 2 ranks cannot divide; .* legal is 1"):
        Layout(tp=2, sp=True).check(narrow.replace(moe_ffn_hidden_size=705))
    Layout(tp=2, etp=1, sp=True).check(source.replace(moe_ffn_hidden_size=705))
    for precision in FP8:
        with pytest.raises(InputError, match="is not supported for multi-latent attention; legal are bf16 and fp32"):
            check_fp8(source, Layout(), precision)


def test_heads_of_latents_have_no_residual():
    source = from_hf(LITE)
    with pytest.raises(InputError, match="a head residual is not defined for multi-latent attention"):
        check_residual(source, source.replace(num_attention_heads=12), "paper")


def test_serving(tmp_path):
    write_json(tmp_path / "config.json", LITE)
    assert serving_commands(tmp_path, tp=8)["vllm"][0].endswith("--dtype bfloat16 --tensor-parallel-size 8")
    with pytest.raises(InputError, match="tp=3 does not divide 16 heads"):
        serving_commands(tmp_path, tp=3)
