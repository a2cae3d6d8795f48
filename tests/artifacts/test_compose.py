"""One plan for successive cuts: the same bytes, whatever the axes, layers and experts; no files, no torch."""

import numpy as np
import pytest

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import compose
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.student import Student
from nemo_minitron.search import random_plan

DENSE = Architecture(
    num_layers=6, hidden_size=20, ffn_hidden_size=14, num_attention_heads=12, num_query_groups=4, head_dim=4,
    vocab_size=17, qkv_bias=True, mlp_bias=True, normalization="layernorm", qk_norm=True,
)  # fmt: skip
MIXED = DENSE.replace(
    normalization="rmsnorm", mlp_bias=False, num_moe_experts=5, moe_ffn_hidden_size=6,
    moe_layer_freq=(1, 0, 1, 1, 0, 1), moe_shared_expert_intermediate_size=7, moe_shared_expert_gate=True,
)  # fmt: skip
FIRST = {"hidden": 13, "ffn": 9, "heads": 6, "query_groups": 3, "vocab": 11, "layers": 4}
THEN = {"hidden": 7, "ffn": 5, "heads": 2, "query_groups": 2, "layers": 2}
CUTS = {
    "everything twice": (DENSE, [FIRST, THEN]),
    "each once": (DENSE, [{"layers": 3, "ffn": 8}, {"hidden": 9, "query_groups": 2}]),
    "one axis by one": (DENSE, [{"heads": 8}, {"layers": 5}, {"ffn": 3}]),
    "nothing, then something": (DENSE, [{}, {"ffn": 3}, {}]),
    "experts": (MIXED, [{"experts": 4, "layers": [0, 1, 2, 5]}, {"expert_ffn": 4, "experts": 2, "layers": [1, 3]}]),
    "their neurons": (MIXED, [{"expert_ffn": 5, "shared_expert_ffn": 5}, {"experts": 3}, {"expert_ffn": 2}]),
    "experts of a token": (MIXED, [{"experts_per_token": 1}, {"experts": 1}]),
    "and no mixture is left": (MIXED, [{"experts_per_token": 1}, {"layers": [1, 4]}]),
    "no mixture is left": (MIXED, [{"experts": 4, "expert_ffn": 3, "ffn": 8}, {"layers": [1, 4]}]),
}  # fmt: skip


class Teacher:
    """Random numbers under canonical names."""

    def __init__(self, architecture):
        generator = np.random.default_rng(0)
        self.architecture = architecture
        self.tensors = {n: generator.random(shape, np.float32) for n, shape in architecture.shapes().items()}

    def dtype(self, name):
        return "F32"

    def read(self, name, index):
        return self.tensors[name][np.ix_(*index)]


def plans_of(source, sizes):
    plans = []
    for seed, keep in enumerate(sizes):
        plans.append(random_plan(source, keep, seed=seed))
        source = plans[-1].target
    return plans


def whole(student):
    shapes = student.architecture.shapes()
    return {name: student.read(name, tuple(np.arange(n) for n in shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", CUTS)
def test_one_cut_gives_the_bytes_of_successive_cuts(name):
    source, sizes = CUTS[name]
    plans = plans_of(source, sizes)
    student = Teacher(source)
    for plan in plans:
        student = Student(student, plan)
    made = compose(*plans)
    expected, found = whole(student), whole(Student(Teacher(source), made))
    assert found.keys() == expected.keys()
    assert [n for n in found if found[n].tobytes() != expected[n].tobytes()] == []
    assert (made.source, made.target) == (source, plans[-1].target)
    assert compose(plans[0], compose(*plans[1:])).keep == made.keep


def test_whose_digest_and_whose_notes():
    plans = plans_of(DENSE, [{"ffn": 12}, {"ffn": 10}, {"ffn": 8}])
    for number, plan in enumerate(plans):
        plan.model_digest, plan.notes = f"model {number}", {"round": number}
    made = compose(*plans)
    assert made.model_digest == "model 0"
    assert made.notes == {"round": 2, "earlier": [{"round": 0}, {"round": 1}]}
    assert compose(plans[0]) is plans[0]


def test_plans_that_do_not_follow_each_other_are_refused():
    first, second = plans_of(DENSE, [{"ffn": 12}, {"ffn": 10}])
    with pytest.raises(InputError, match=r"the plans do not follow each other: one leaves .* in the order of the cuts"):
        compose(second, first)
