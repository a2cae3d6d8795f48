"""The table of axes is total and fits the shapes."""

import math

import pytest
from test_architecture import smollm2

from nemo_minitron.axes import AXES, axis, owners, split_expert, split_name
from nemo_minitron.errors import InputError

# Sizes without a common factor that could hide a wrong dimension; every optional tensor is there
FULL = smollm2(
    num_layers=2, hidden_size=29, ffn_hidden_size=31, num_attention_heads=6, num_query_groups=3, head_dim=7,
    vocab_size=37, tied_embeddings=False, normalization="layernorm", qkv_bias=True, mlp_bias=True,
    attention_output_bias=True, qk_norm=True, post_norms=True,
)  # fmt: skip
# Every third layer is a mixture of experts, with a gated shared expert
MIXED = FULL.replace(
    num_layers=4, mlp_bias=False, post_norms=False, num_moe_experts=5, moe_ffn_hidden_size=23, moe_layer_freq=3,
    moe_shared_expert_intermediate_size=19, moe_shared_expert_gate=True,
)  # fmt: skip
# gpt-oss: biases of experts and routers, and a sink in each head
SINKS = FULL.replace(
    post_norms=False, num_moe_experts=5, moe_ffn_hidden_size=23, moe_router_bias=True, attention_sinks=True
)
# DeepSeek V3: latents, a shared expert, and a bias that changes which experts are chosen
LATENT = FULL.replace(
    num_layers=3, normalization="rmsnorm", mlp_bias=False, post_norms=False, qkv_bias=False, qk_norm=False,
    attention_output_bias=False, num_query_groups=1, kv_lora_rank=11, q_lora_rank=13, qk_pos_emb_head_dim=2,
    v_head_dim=3, num_moe_experts=6, moe_ffn_hidden_size=23, moe_layer_freq=(0, 1, 1), moe_router_num_groups=2,
    moe_router_enable_expert_bias=True, moe_shared_expert_intermediate_size=19,
)  # fmt: skip
STATES = [f"{part}{end}" for part in "bc" for end in (".weight", "_conv.weight", "_conv.bias")]
# Two Mamba layers, attention and an MLP
HYBRID = FULL.replace(
    num_layers=4, qk_norm=False, post_norms=False, normalization="rmsnorm", gated_mlp=False, hybrid_pattern="M*-M",
    mamba_num_heads=10, mamba_head_dim=3, mamba_num_groups=5, mamba_state_dim=2,
)  # fmt: skip
EVERY = {"dense": FULL, "mixed": MIXED, "hybrid": HYBRID, "sinks": SINKS, "latents": LATENT}


@pytest.mark.parametrize("full", EVERY.values(), ids=EVERY)
def test_every_dimension_has_one_owner_of_its_length(full):
    for name, shape in full.shapes().items():
        dims, seen = {}, {}
        for cut, row in owners(name):
            length = cut.length(full) * math.prod(row.sizes(full))
            assert dims.setdefault(row.dim, length) == length, f"{name} dim {row.dim} has two lengths"
            assert row.dim not in seen or {cut.name, seen[row.dim]} == {"mamba_heads", "mamba_head_dim"}, name
            seen[row.dim] = cut.name
            if cut.per_layer:
                assert split_name(name)[0] in cut.layers_of(full), name
        if split_name(name)[1] in ("q_norm.weight", "k_norm.weight"):
            assert dims == {}  # head_dim stays
        elif split_name(name)[1] == "k_rope.weight":
            assert dims == {1: full.hidden_size}  # all heads share its rows, which are rotary frequencies
        elif split_name(name)[1] in STATES:  # B, C and the width of the convolution stay
            assert dims == ({1: full.hidden_size} if name.endswith((".b.weight", ".c.weight")) else {}), name
        elif name.endswith("x_conv.weight"):
            assert dims == {0: shape[0]}
        elif split_name(name)[1] == "shared_expert.router.weight":
            assert dims == {1: full.hidden_size}  # one row, which stays
        else:
            assert tuple(dims[dim] for dim in range(len(shape))) == shape, name


def test_no_row_without_a_tensor():
    local = {split_expert(split_name(name)[1])[1] for full in EVERY.values() for name in full.shapes()}
    for cut in AXES.values():
        assert {row.tensor for row in cut.rows} <= local


def test_names():
    assert split_name("layers.12.q.weight") == (12, "q.weight")
    assert split_name("final_norm.weight") == (None, "final_norm.weight")
    assert split_expert("experts.12.gate.weight") == (12, "experts.{e}.gate.weight")
    assert split_expert("shared_expert.gate.weight") == (None, "shared_expert.gate.weight")
    assert axis("heads").size == "num_attention_heads"
    with pytest.raises(InputError, match="no axis 'hiden'; did you mean 'hidden'"):
        axis("hiden")


def test_axes_that_a_model_lacks():
    lengths = {name: cut.length(MIXED) for name, cut in AXES.items()}
    assert lengths == {
        "layers": 4, "hidden": 29, "ffn": 31, "heads": 6, "query_groups": 3, "experts": 5, "expert_ffn": 23,
        "shared_expert_ffn": 19, "experts_per_token": 2, "vocab": 37, "mamba_heads": 0, "mamba_head_dim": 0,
        "q_latent": 0, "kv_latent": 0,
    }  # fmt: skip
    assert [axis(name).length(LATENT) for name in ("query_groups", "q_latent", "kv_latent")] == [0, 13, 11]
    assert [axis(name).length(FULL) for name in ("experts", "experts_per_token", "expert_ffn")] == [0, 0, 0]
    assert axis("ffn").length(MIXED.replace(moe_layer_freq=1)) == 0
    assert (list(axis("ffn").layers_of(MIXED)), list(axis("experts").layers_of(MIXED))) == ([1, 2], [0, 3])
