"""The table of axes is total and fits the shapes."""

import pytest
from test_architecture import smollm2

from nemo_minitron.axes import AXES, axis, owners, split_expert, split_name
from nemo_minitron.errors import InputError

# Sizes without a common factor that could hide a wrong dimension; every optional tensor is there
FULL = smollm2(
    num_layers=2, hidden_size=29, ffn_hidden_size=31, num_attention_heads=6, num_query_groups=3, head_dim=7,
    vocab_size=37, tied_embeddings=False, normalization="layernorm", qkv_bias=True, mlp_bias=True,
    attention_output_bias=True, qk_norm=True,
)  # fmt: skip
# Every third layer is a mixture of experts, with a gated shared expert
MIXED = FULL.replace(
    num_layers=4, mlp_bias=False, num_moe_experts=5, moe_ffn_hidden_size=23, moe_shared_expert_intermediate_size=19,
    moe_shared_expert_gate=True, moe_layer_freq=3,
)  # fmt: skip


@pytest.mark.parametrize("full", [FULL, MIXED], ids=["dense", "mixed"])
def test_every_dimension_has_one_owner_of_its_length(full):
    for name, shape in full.shapes().items():
        dims = {}
        for cut, row in owners(name):
            assert row.dim not in dims, f"{name} dim {row.dim} has two owners"
            dims[row.dim] = cut.length(full) * (full.head_dim if row.unit == "head_dim" else 1)
            if cut.per_layer:
                assert split_name(name)[0] in cut.layers_of(full), name
        if split_name(name)[1] in ("q_norm.weight", "k_norm.weight"):
            assert dims == {}  # head_dim stays
        elif split_name(name)[1] == "shared_expert.router.weight":
            assert dims == {1: full.hidden_size}  # one row, which stays
        else:
            assert tuple(dims[dim] for dim in range(len(shape))) == shape, name


def test_no_row_without_a_tensor():
    local = {split_expert(split_name(name)[1])[1] for full in (FULL, MIXED) for name in full.shapes()}
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
        "shared_expert_ffn": 19, "vocab": 37,
    }  # fmt: skip
    assert [axis(name).length(FULL) for name in ("experts", "expert_ffn", "shared_expert_ffn")] == [0, 0, 0]
    assert axis("ffn").length(MIXED.replace(moe_layer_freq=1)) == 0
    assert (list(axis("ffn").layers_of(MIXED)), list(axis("experts").layers_of(MIXED))) == ([1, 2], [0, 3])
