"""From a student's tensor to the teacher's rows and columns."""

import numpy as np
import pytest
from plans_by_hand import FFN, HIDDEN, LAYERS, whole_groups, width_and_depth
from test_architecture import smollm2

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.errors import InputError
from nemo_minitron.pruning import student_index

SIZES = {"num_layers": 6, "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 6, "head_dim": 8}
FULL = smollm2(
    **SIZES, vocab_size=509, tied_embeddings=False, normalization="layernorm", qkv_bias=True,
    attention_output_bias=True, mlp_bias=True, qk_norm=True,
)  # fmt: skip


def vocabulary(source):
    return PrunePlan(source=source, target=source.replace(vocab_size=3), keep={"vocab": [0, 7, 508]})


@pytest.mark.parametrize("cut", [width_and_depth, whole_groups, vocabulary])
def test_every_tensor_of_the_student(cut):
    plan = cut(FULL)
    source_shapes = FULL.shapes()
    for name, shape in plan.target.shapes().items():
        source_name, index = student_index(plan, name)
        assert tuple(map(len, index)) == shape
        for kept, size in zip(index, source_shapes[source_name], strict=True):
            assert kept.dtype == np.int64
            assert (np.diff(kept) > 0).all()
            assert 0 <= kept[0] <= kept[-1] < size


def test_by_hand():
    plan = width_and_depth(FULL)
    assert student_index(plan, "layers.1.input_norm.bias")[0] == f"layers.{LAYERS[1]}.input_norm.bias"
    name, (rows, columns) = student_index(plan, "layers.2.down.weight")
    assert name == "layers.5.down.weight"
    assert rows.tolist() == HIDDEN
    assert columns.tolist() == FFN[5]
    _, (rows, _) = student_index(plan, "layers.1.q.weight")  # heads 1, 3, 4 of source layer 2
    assert rows.tolist() == [*range(8, 16), *range(24, 40)]
    _, (rows, columns) = student_index(plan, "layers.1.k.weight")
    assert rows.tolist() == list(range(24))  # groups stay
    assert columns.tolist() == HIDDEN
    _, (rows,) = student_index(plan, "layers.0.q_norm.weight")
    assert rows.tolist() == list(range(8))
    _, (rows,) = student_index(whole_groups(FULL), "layers.2.v.bias")  # groups 0 and 2 of source layer 5
    assert rows.tolist() == [*range(8), *range(16, 24)]


def test_no_such_tensor():
    plan = width_and_depth(FULL)
    with pytest.raises(InputError, match=r"no tensor 'layers\.3\.q\.weight'"):
        student_index(plan, "layers.3.q.weight")


def test_a_plan_changed_after_it_was_checked():
    plan = width_and_depth(FULL)
    plan.keep["hidden"] = plan.keep["hidden"][:-1]
    with pytest.raises(InputError, match="the plan keeps"):
        student_index(plan, "final_norm.weight")
