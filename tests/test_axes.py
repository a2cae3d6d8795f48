"""The table of axes is total and fits the shapes."""

import pytest
from test_architecture import smollm2

from nemo_minitron.axes import AXES, axis, owners, split_name
from nemo_minitron.errors import InputError

# Sizes without a common factor that could hide a wrong dimension; every optional tensor is there
FULL = smollm2(
    num_layers=2, hidden_size=29, ffn_hidden_size=31, num_attention_heads=6, num_query_groups=3, head_dim=7,
    vocab_size=37, tied_embeddings=False, normalization="layernorm", qkv_bias=True, mlp_bias=True,
    attention_output_bias=True, qk_norm=True,
)  # fmt: skip


def test_every_dimension_has_one_owner_of_its_length():
    for name, shape in FULL.shapes().items():
        dims = {}
        for cut, row in owners(name):
            assert row.dim not in dims, f"{name} dim {row.dim} has two owners"
            dims[row.dim] = cut.length(FULL) * (FULL.head_dim if row.unit == "head_dim" else 1)
        if split_name(name)[1] in ("q_norm.weight", "k_norm.weight"):
            assert dims == {}  # head_dim stays
        else:
            assert tuple(dims[dim] for dim in range(len(shape))) == shape, name


def test_no_row_without_a_tensor():
    local = {split_name(name)[1] for name in FULL.shapes()}
    for cut in AXES.values():
        assert {row.tensor for row in cut.rows} <= local


def test_names():
    assert split_name("layers.12.q.weight") == (12, "q.weight")
    assert split_name("final_norm.weight") == (None, "final_norm.weight")
    assert axis("heads").size == "num_attention_heads"
    with pytest.raises(InputError, match="no axis 'hiden'; did you mean 'hidden'"):
        axis("hiden")
