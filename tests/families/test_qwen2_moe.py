"""Configs of Qwen2-MoE: published sizes, the tensors and keys of both transformers, and what is refused."""

import json

import numpy as np
import pytest
from pico import SIZES, pico_qwen2_moe, raw_tensors
from test_config_forms import in_form_5

from nemo_minitron.errors import InputError
from nemo_minitron.families import (
    check_host,
    family_of,
    family_of_fields,
    family_of_nemo,
    from_hf,
    multiples_of,
    read_config,
    remark_on,
    to_hf,
)
from nemo_minitron.families.bridge import bridge_fields
from nemo_minitron.pruning import HFSource, prune
from nemo_minitron.pruning.convert import identity
from nemo_minitron.search.space import make_space

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
EXPERTS |= {"shared_expert_intermediate_size": 72}
CONFIG = SIZES | EXPERTS | {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}
# the config of Qwen1.5-MoE-A2.7B, whose window is not in use
A2_7B = {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_size": 2048, "hidden_act": "silu",
    "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21, "num_attention_heads": 16,
    "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": False, "vocab_size": 151936,
    "decoder_sparse_step": 1, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4, "num_experts": 60, "norm_topk_prob": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip


# the sizes of the Qwen2 technical report (2407.10671, table 1); eight shared experts are one of eight widths
A14B = A2_7B | {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480, "num_experts": 64,
    "num_experts_per_tok": 8,
}  # fmt: skip


def test_published_sizes():
    architecture = from_hf(A2_7B)
    assert architecture.parameters() == 14_315_784_192
    assert architecture.parameters(active=True) == 2_689_173_504  # its name says 2.7 billion
    assert from_hf(A14B).parameters() == 57_408_658_944
    assert (architecture.head_dim, architecture.qkv_bias, architecture.attention_output_bias) == (128, True, False)


def test_a_silent_config_has_the_classs_defaults():
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig())
    silent = from_hf({"model_type": "qwen2_moe", "hidden_size": 2048, "num_attention_heads": 16})
    assert silent.parameters() == model.num_parameters() == 14_315_784_192
    assert (silent.moe_router_topk, silent.moe_shared_expert_gate) == (4, True)


def test_names_and_bits_are_transformers(tmp_path):
    """Every tensor's name and shape, and a folder of all of it with the same bits, the gate's among them."""
    from transformers import AutoModelForCausalLM

    source = HFSource(pico_qwen2_moe(tmp_path / "t", mlp_only_layers=[2]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "t")
    shapes = source.architecture.shapes()
    names = source.family.hf_tensors(source.architecture)
    assert {name: shapes[part] for name, (part,) in names.items()} == {
        name: tuple(tensor.shape) for name, tensor in model.named_parameters()
    }
    assert shapes["layers.0.shared_expert.router.weight"] == (1, 48)
    prune(source, identity(source.architecture), tmp_path / "s")
    before, after = raw_tensors(tmp_path / "t"), raw_tensors(tmp_path / "s")
    assert before.keys() == after.keys()
    assert all(np.array_equal(after[name], tensor) for name, tensor in before.items())


def test_what_transformers_5_writes_is_the_same_model():
    """It lists the attention of each layer, and writes 0 for a window that is not in use."""
    newer = in_form_5(CONFIG) | {"layer_types": ["full_attention"] * 6, "sliding_window": 0}
    assert from_hf(newer) == from_hf(CONFIG)
    assert bridge_fields(family_of(CONFIG), read_config(newer)) == bridge_fields(family_of(CONFIG), CONFIG)
    student = to_hf(from_hf(CONFIG).keep_layers([0, 3]), newer, [0, 3])
    assert student["layer_types"] == ["full_attention"] * 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_a_checkpoint_of_bridge_is_this_family(normalized, bias):
    config = CONFIG | {"norm_topk_prob": normalized, "mlp_only_layers": [2], "qkv_bias": bias}
    fields = bridge_fields(family_of(config), config)
    assert (fields["moe_shared_expert_gate"], fields["add_qkv_bias"]) == (True, bias)
    assert fields["moe_router_pre_softmax"] is not normalized
    every = {"gated_linear_unit": True, "normalization": "RMSNorm"} | fields
    family = family_of_fields(every)
    assert family is family_of(config)
    found = family.from_nemo(every)
    names = ("norm_topk_prob", "mlp_only_layers", "qkv_bias", "use_sliding_window")
    assert [found[name] for name in names] == [normalized, [2], bias, False]
    assert from_hf(found) == from_hf(config)
    with pytest.raises(InputError):  # a shared expert without a gate is no family's
        family_of_fields(every | {"moe_shared_expert_gate": False})


def test_nemo_is_refused_by_name_with_the_host_that_has_it():
    with pytest.raises(InputError, match=r"no gate of a shared expert, which a Qwen2MoeForC.* give --host bridge"):
        check_host(CONFIG, "nemo")
    check_host(CONFIG, "bridge")
    assert family_of_nemo("Qwen2Model", {}).model_type == "qwen2"


def test_sizes_that_one_transformers_does_not_run():
    """A search leaves the hidden size as it is; a remark names the nearest one of transformers 4."""
    assert multiples_of(CONFIG) == {"hidden_size": 48, "moe_ffn_hidden_size": 8}
    teacher = from_hf(CONFIG)
    space = make_space(teacher, loads=multiples_of(CONFIG))
    assert space.sizes["hidden"] == (48,)
    assert len(space.sizes["experts"]) > 1
    assert remark_on(teacher, CONFIG) is None
    assert "6 x 8 are not 40, though transformers 5 runs it; the nearest hidden_size is 48" in remark_on(
        teacher.replace(hidden_size=40), CONFIG
    )
    assert remark_on(teacher.replace(hidden_size=32, num_attention_heads=4, num_query_groups=2), CONFIG) is None
    assert "moe_ffn_hidden_size is a multiple of 8; 36" in remark_on(teacher.replace(moe_ffn_hidden_size=36), CONFIG)


def test_the_dense_layers_go_with_the_layers():
    base = CONFIG | {"mlp_only_layers": [3]}
    student = from_hf(base).keep_layers([0, 3, 5]).replace(moe_shared_expert_intermediate_size=24)
    config = json.loads(json.dumps(to_hf(student, base)))
    assert (config["mlp_only_layers"], config["shared_expert_intermediate_size"]) == ([1], 24)
    assert from_hf(config) == student


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window is True: .* transformers 5 every other one; legal is false"),
        ({"layer_types": ["sliding_attention"] * 6}, "layer_types is"),
        ({"qkv_bias": 1}, "qkv_bias is 1; it must be true or false"),
        ({"norm_topk_prob": "no"}, "norm_topk_prob is 'no'; it must be true or false"),
        ({"norm_topk_prob": True, "num_experts_per_tok": 1}, "the nearest legal num_experts_per_tok is 2"),
        ({"num_experts": 1}, "moe_router_topk is 2 of 1 experts"),
        ({"shared_expert_intermediate_size": 0}, "moe_shared_expert_intermediate_size is 0; it must be"),
        ({"decoder_sparse_step": 7}, "no layer of this Qwen2MoeForCausalLM is a mixture of experts"),
    ],
)
def test_refused_by_name(fields, message):
    with pytest.raises(InputError, match=message):
        bridge_fields(family_of(CONFIG), CONFIG | fields)
