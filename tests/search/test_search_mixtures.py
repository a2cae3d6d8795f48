"""Plans for mixtures of experts, by score and at random."""

import numpy as np
import pytest
from test_architecture import mixed

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Scores
from nemo_minitron.errors import InputError
from nemo_minitron.search import Target, compare_plans, make_space, plan, random_plan, search, threshold_band

SOURCE = mixed(moe_ffn_hidden_size=6, moe_shared_expert_intermediate_size=5)  # layers 0 and 3 of six, four experts
KEEP = {"experts": 2, "expert_ffn": 3, "shared_expert_ffn": 4, "ffn": 1000}


def scores(seed=0):
    generator = np.random.default_rng(seed)
    shapes = {"experts": (6, 4), "expert_ffn": (6, 4, 6), "shared_expert_ffn": (6, 5), "ffn": (6, 1536)}
    return Scores(SOURCE, {name: generator.random(shape, dtype=np.float32) for name, shape in shapes.items()})


def largest(values, count):
    return sorted(np.argsort(-values)[:count].tolist())


def test_the_most_important_of_each_layer_and_expert():
    given = scores()
    made = plan(given, KEEP)
    assert made.keep["experts"] == {n: largest(given["experts"][n], 2) for n in (0, 3)}
    for layer, experts in made.keep["experts"].items():
        expected = {e: largest(given["expert_ffn"][layer, e], 3) for e in experts}
        assert made.keep["expert_ffn"][layer] == expected
    assert made.keep["shared_expert_ffn"] == {n: largest(given["shared_expert_ffn"][n], 4) for n in (0, 3)}
    assert list(made.keep["ffn"]) == [1, 2, 4, 5]  # the dense layers
    whole = plan(given, {"expert_ffn": 3})
    assert list(whole.keep["expert_ffn"][0]) == [0, 1, 2, 3]


def test_random_plans_do_not_depend_on_what_else_is_cut():
    both, alone = random_plan(SOURCE, KEEP, seed=3), random_plan(SOURCE, {"expert_ffn": 3}, seed=3)
    assert both.keep["expert_ffn"][3] == {e: alone.keep["expert_ffn"][3][e] for e in both.keep["experts"][3]}
    assert len({tuple(kept) for layer in alone.keep["expert_ffn"].values() for kept in layer.values()}) > 1


def test_plans_that_differ_in_one_neuron():
    given = scores()
    a = plan(given, {"expert_ffn": 3})
    ranked = np.argsort(-given["expert_ffn"][3, 2])
    given.tensors["expert_ffn"][3, 2, ranked[3]] = given["expert_ffn"][3, 2, ranked[2]] * (1 + 1e-6)
    b = plan(given, {"expert_ffn": 3})
    assert compare_plans(a, b, given, 1e-5) == (False, 2, 0)
    assert threshold_band(given, a, 1e-5) == {"expert_ffn": 2}


def test_fewer_experts_for_a_token():
    """Nothing is ranked: the router's first stay. Then fewer experts may stay, too."""
    made = plan(scores(), {"experts_per_token": 1, "experts": 1})
    assert made.keep["experts_per_token"] == [0]
    assert made.keep["experts"] == {n: largest(scores()["experts"][n], 1) for n in (0, 3)}
    assert made.target == SOURCE.replace(moe_router_topk=1, num_moe_experts=1)
    alone = random_plan(SOURCE, {"experts_per_token": 1})
    assert (alone.keep, alone.target.parameters()) == ({"experts_per_token": [0]}, SOURCE.parameters())
    expert = 3 * 576 * 6 * 2  # three matrices of an expert in two layers work no more
    assert SOURCE.parameters(active=True) - alone.target.parameters(active=True) == expert
    assert SOURCE.flops_per_token() - alone.target.flops_per_token() == 2 * expert
    with pytest.raises(InputError, match="experts=1 is not legal; legal are 2 to 4"):
        plan(scores(), {"experts": 1})


def test_a_search_may_hold_the_experts_of_a_token():
    """Their number changes no score; a list of numbers could not be ranked."""
    space = make_space(SOURCE, lists={"experts": [2, 3]}, keep={"experts_per_token": 1})
    target = Target("FLOPs", 10**10, Architecture.flops_per_token)
    found = search(space, [target], scores()).candidates
    assert {c.architecture.moe_router_topk for c in found} == {1}
    assert [c.architecture.num_moe_experts for c in found] == [3, 2]
    with pytest.raises(InputError, match=r"'experts_per_token' cannot vary in a search.* give one in --keep"):
        make_space(SOURCE, lists={"experts_per_token": [1, 2]})


def test_layers_that_are_listed_stay_what_they_are():
    made = random_plan(SOURCE, {"layers": [1, 3], "experts": 3})
    assert made.target == SOURCE.keep_layers([1, 3]).replace(num_moe_experts=3)
    assert list(made.keep["experts"]) == [3]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"layers": 3}, "list the layers that stay"),
        ({"experts": 1}, "experts=1 is not legal; legal are 2 to 4, the nearest is 2"),
        ({"experts": 5}, "experts=5 is not legal; legal are 2 to 4, the nearest is 4"),
        ({"experts_per_token": 3}, "experts_per_token=3 is not legal; legal are 1 to 2, the nearest is 2"),
        ({"experts_per_token": 0}, "experts_per_token=0 is not legal; legal are 1 to 2, the nearest is 1"),
        ({"num_experts_per_tok": 1}, "no axis 'num_experts_per_tok'; did you mean 'experts_per_token'"),
    ],
)
def test_what_is_refused(keep, message):
    with pytest.raises(InputError, match=message):
        random_plan(SOURCE, keep)


def test_an_axis_that_the_model_lacks():
    with pytest.raises(InputError, match=r"no 'ffn' to cut; it has .*expert_ffn"):
        random_plan(SOURCE.replace(moe_layer_freq=1), {"ffn": 3})
