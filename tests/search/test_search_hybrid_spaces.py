"""Searches of a Mamba hybrid: numbers of layers of each kind, Mamba heads and channels, against brute force."""

import dataclasses
import itertools

import numpy as np
import pytest
from spaces import brute_force, shapes_of
from test_architecture import mixed
from test_search_hybrids import DENSE, HYBRID, INFLUENCE, scores
from test_search_space import COSTS

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.axes import AXES
from nemo_minitron.commands.plan import run_plan
from nemo_minitron.errors import InputError
from nemo_minitron.hybrid import COUNTS
from nemo_minitron.job.stages.search import as_large_as
from nemo_minitron.search import Divisors, Target, make_space, parse, plan, random_plan, search
from nemo_minitron.search.candidates import cut_of
from nemo_minitron.search.formula import Formula
from nemo_minitron.search.marginals import points_of
from nemo_minitron.search.proxy import WEIGHTS, make_proxy
from nemo_minitron.search.varied import length, resized
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.search import Search

BOUNDS = {
    "mamba_layers": (1, 4), "attention_layers": (1, 2), "mlp_layers": (2, 3), "hidden": (10, 12), "heads": (4, 6),
    "query_groups": (1, 3), "mamba_heads": (1, 4), "mamba_head_dim": (2, 3),
}  # fmt: skip


def test_every_legal_shape_comes_once():
    """Two groups of Mamba heads keep the same number of them each, and so do query groups."""
    steps = Divisors(of={"hidden": 1, "mamba_head_dim": 1})
    space = make_space(HYBRID, bounds=BOUNDS, keep={"ffn": 20}, divisors=steps)
    sizes = {name: range(low, high + 1) for name, (low, high) in BOUNDS.items()} | {"mamba_heads": (2, 4)}
    shapes = [{n: length(shape, n) for n in space.axes} for _, shape in brute_force(HYBRID, sizes)]
    found = list(shapes_of(space))
    assert sorted(found) == sorted(tuple(shape.values()) for shape in shapes)
    assert len(found) == len({*found}) > 300
    assert space.axes[:3] == tuple(COUNTS)


def test_what_varies_by_default():
    space = make_space(HYBRID)
    assert {name: (sizes[0], sizes[-1]) for name, sizes in space.sizes.items()} == {
        "mamba_layers": (2, 4), "attention_layers": (1, 2), "mlp_layers": (2, 3), "hidden": (6, 12), "ffn": (10, 20),
        "mamba_heads": (2, 4),
    }  # fmt: skip
    listed = make_space(HYBRID, keep={"layers": [0, 1, 3, 5]})
    assert (listed.axes, listed.source) == (("hidden", "ffn", "mamba_heads"), HYBRID.keep_layers([0, 1, 3, 5]))
    fixed = make_space(HYBRID, keep={"mamba_layers": 3})
    assert fixed.sizes["mamba_layers"] == (3,)


@pytest.mark.parametrize("cost", COSTS)
def test_formulas_are_the_architectures(cost):
    """One layer of a kind is enough of it. Mutation: `resized` that leaves the numbers of layers out."""
    source = HYBRID.keep_layers([0, 1, 2, 3, 5])
    axes = (*COUNTS, "hidden", "ffn", "heads", "mamba_heads", "mamba_head_dim")
    generator = np.random.default_rng(5)
    columns = {name: generator.integers(1, length(source, name) + 1, 40) for name in axes}
    columns["mamba_heads"] = generator.integers(1, 3, 40) * 2
    columns["heads"] = np.full(40, 3) * generator.integers(1, 3, 40)
    found = Formula(COSTS[cost], source, axes)(columns).tolist()
    shapes = [resized(source, {name: int(c[i]) for name, c in columns.items()}) for i in range(40)]
    assert found == [COSTS[cost](shape) for shape in shapes]
    assert len({shape.hybrid_pattern for shape in shapes}) == 3


def test_a_resized_model_keeps_the_first_layers_of_a_kind():
    assert resized(HYBRID, {"mamba_layers": 2, "mlp_layers": 1}).hybrid_pattern == "M-M**"
    assert resized(HYBRID, {"attention_layers": 3}).hybrid_pattern == HYBRID.hybrid_pattern + "*"
    assert resized(HYBRID, {"hidden": 7}) == HYBRID.replace(hidden_size=7)


def test_the_proxy_takes_the_influence_of_all_kinds_together():
    s = scores(HYBRID, INFLUENCE)  # of M 5 2 4 1, of - 1 9 3, of * 8 7
    proxy = make_proxy(s, ("mamba_layers", "mlp_layers"))
    sizes = {"mamba_layers": np.array([4, 2, 1]), "mlp_layers": np.array([3, 1, 2])}
    kept = np.array([40, (5 + 4) + 9 + 15, 5 + (9 + 3) + 15]) / 40
    np.testing.assert_allclose(proxy(sizes), kept ** WEIGHTS["layers"], rtol=1e-6)
    whole = {name: np.array([length(HYBRID, name)]) for name in make_space(HYBRID).axes}
    np.testing.assert_allclose(make_proxy(s, tuple(whole))(whole), [1.0], rtol=1e-6)


def test_every_candidate_is_a_plan_of_its_size():
    s, space = scores(HYBRID, INFLUENCE), make_space(HYBRID, bounds={"mamba_head_dim": (2, 3)})
    target = Target("parameters", HYBRID.parameters() * 3 // 4, lambda a: a.parameters(), 0.05)
    found = search(space, [target], s, top=40)
    assert len(found.candidates) == 40
    for candidate in found.candidates:
        made = plan(s, cut_of(candidate, HYBRID))
        assert made.target.parameters() == candidate.architecture.parameters()
        assert {n: length(made.target, n) for n in space.axes} == candidate.sizes
    assert any("layers" not in plan(s, cut_of(c, HYBRID)).keep for c in search(space, [target], s, top=4000).candidates)


@pytest.mark.parametrize(("keep", "axis"), [("", "mamba_layers"), ("layers=0-3+5", "mamba_heads")])
def test_a_plan_within_a_budget(tmp_path, keep, axis):
    scores(HYBRID, INFLUENCE).save(tmp_path / "scores.safetensors")
    search = Search(params="0.5x", candidates=3, distil=1)
    outcome = run_plan(tmp_path / "scores.safetensors", parse.sizes(keep), search)
    assert outcome.plan.target.parameters() == outcome.rows[0]["parameters"] <= HYBRID.parameters() // 2
    assert outcome.uncut["parameters"] == HYBRID.parameters()
    assert outcome.rows[0][axis] == length(outcome.plan.target, axis)
    if keep:
        assert outcome.plan.keep["layers"] == [0, 1, 2, 3, 5]
        assert "mamba_layers" not in outcome.rows[0]


def test_cuts_of_one_kind_alone_measure_losses():
    space = make_space(HYBRID)
    assert points_of(space, "mamba_layers", 4) == [2, 3]
    assert plan(scores(HYBRID, INFLUENCE), {"mamba_layers": 2}).target.hybrid_pattern == "M-*-M-*"


def test_other_units_of_the_same_sizes():
    """For the random student and the gates. The job may list the layers, and then they stay."""
    made = plan(scores(HYBRID, INFLUENCE), {"mamba_layers": 2, "attention_layers": 1, "ffn": 7})
    assert as_large_as(made, {}) == {"mamba_layers": 2, "attention_layers": 1, "mlp_layers": 3, "ffn": 7}
    others = [random_plan(HYBRID, as_large_as(made, {}), seed=seed) for seed in range(4)]
    assert {other.target.parameters() for other in others} == {made.target.parameters()}
    assert len({tuple(other.keep["layers"]) for other in others}) > 1
    listed = made.keep["layers"]
    assert as_large_as(made, {"layers": listed}) == {"ffn": 7, "layers": listed}
    dense = PrunePlan(DENSE, DENSE.keep_layers([0, 1]), {"layers": [0, 1]})
    assert as_large_as(dense, {}) == {"layers": 2}


def test_candidates_run_in_the_layout():
    """Ranks of CP share the Mamba heads of a rank: of 4, 2 would leave half a head to each of 4 ranks."""
    source = HYBRID.replace(mamba_num_heads=8, num_attention_heads=4, num_query_groups=2)
    layout = Layout(tp=2, cp=4)
    space = make_space(source, lists={"mamba_heads": [4, 8], "ffn": [10, 20]})
    target = Target("parameters", source.parameters(), lambda a: a.parameters())
    assert {c.sizes["mamba_heads"] for c in search(space, [target]).candidates} == {4, 8}
    layout.check(source, training=True)
    check = lambda shape: layout.check_student(shape, source)  # noqa: E731
    assert {c.sizes["mamba_heads"] for c in search(space, [target], check=check).candidates} == {8}
    with pytest.raises(InputError, match="2 Mamba heads in 1 groups on each rank do not divide over cp=4"):
        search(dataclasses.replace(space, sizes=space.sizes | {"mamba_heads": (4,)}), [target], check=check)


def test_divisors():
    source = HYBRID.replace(mamba_num_heads=32, mamba_head_dim=24, mamba_num_groups=4, ffn_hidden_size=1024)
    bounds = {"mamba_heads": (4, 32), "mamba_head_dim": (8, 24)}
    shapes = [shape[-2:] for shape in shapes_of(make_space(source, lists={"ffn": [1024]}, bounds=bounds))]
    assert [*itertools.product(range(4, 33, 4), (8, 10, 12, 14, 16, 18, 20, 22, 24))] == sorted(shapes)
    local = parse.divisors("fp8=64,tp=8")
    space = make_space(source, lists={"ffn": [1024]}, bounds=bounds, divisors=local)
    assert {(heads, dim) for *_, heads, dim in shapes_of(space)} == {
        (heads, dim) for heads in (8, 16, 24, 32) for dim in range(8, 25) if heads * dim % 512 == 0
    }


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (HYBRID, {"bounds": {"layers": (3, 9)}}, "not all of one kind; .* it has mamba_layers=4, attention_layers=2"),
        (HYBRID, {"keep": {"layers": 4}}, "not all of one kind; .* it has mamba_layers=4"),
        (HYBRID, {"bounds": {"mamba_layers": (0, 4)}}, "mamba_layers=0:4 is not legal; bounds lie within 1:4"),
        (HYBRID, {"lists": {"mlp_layers": [4]}}, "mlp_layers=4 is not legal; legal are 1 to 3, the nearest is 3"),
        (HYBRID, {"lists": {"mlp_layers": [1]}, "keep": {"mlp_layers": 1}}, "'mlp_layers' is given twice"),
        (HYBRID, {"lists": {"mlp_layers": [1]}, "keep": {"layers": [0, 1]}}, "layers and mlp_layers are both given"),
        (HYBRID, {"lists": {"mamba_heads": [3]}}, "no size of 'mamba_heads' from 3 to 3 is a multiple of 2"),
        (HYBRID, {"bounds": {"experts": (1, 2)}}, "no 'experts' to cut; it has mamba_layers, attention_layers, mlp_"),
        (DENSE, {"bounds": {"mamba_layers": (1, 2)}}, "the model has no 'mamba_layers' to cut; it has layers, hidden"),
        (mixed(), {"bounds": {"layers": (3, 6)}}, "this model's layers are not all of one kind; list the layers"),
    ],
)
def test_refused(source, options, words):
    with pytest.raises(InputError, match=words):
        make_space(source, **options)


def test_every_axis_has_a_length():
    assert {name: length(HYBRID, name) for name in (*COUNTS, "heads", "mamba_head_dim", "experts")} == {
        "mamba_layers": 4, "attention_layers": 2, "mlp_layers": 3, "heads": 6, "mamba_head_dim": 3, "experts": 0,
    }  # fmt: skip
    assert all(length(DENSE, name) == cut.length(DENSE) for name, cut in AXES.items())
