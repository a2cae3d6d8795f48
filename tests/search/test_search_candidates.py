"""Which shapes a search finds, against brute force; the proxy, against sums by hand."""

import sys

import numpy as np
import pytest
from spaces import NEMOTRON, PICO, SPACE_4B, SPACE_8B, brute_force, lengths
from test_architecture import smollm2

from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.scores import expected_shapes
from nemo_minitron.errors import InputError
from nemo_minitron.search import Divisors, make_space, parse, plan, search, targets
from nemo_minitron.search.candidates import cut_of
from nemo_minitron.search.proxy import WEIGHTS, make_proxy

BOUNDS = {"layers": (1, 4), "hidden": (4, 12), "ffn": (5, 20), "heads": (4, 8)}
SPACE = make_space(PICO, bounds=BOUNDS, divisors=Divisors(1))
TARGET = targets.parameters(PICO.parameters() // 2)


def scores(seed=0):
    generator = np.random.default_rng(seed)
    return Scores(PICO, {n: generator.random(s, np.float32) for n, s in expected_shapes(PICO).items()})


def fitting(keep=None):
    """All shapes within 5%, by Architecture itself."""
    sizes = {name: range(low, high + 1) for name, (low, high) in BOUNDS.items()} | (keep or {})
    middle = PICO.parameters() // 2
    shapes = (shape for _, shape in brute_force(PICO, sizes))
    return [shape for shape in shapes if abs(shape.parameters() - middle) <= 0.05 * middle]


def test_everything_within_the_tolerance_is_found():
    expected = {lengths(shape, SPACE.axes) for shape in fitting()}
    found = search(SPACE, [TARGET], top=10_000)
    assert {tuple(c.sizes.values()) for c in found.candidates} == expected
    assert found.fitting == len(found.candidates) == len(expected)
    assert {c.architecture.parameters() for c in found.candidates} == {shape.parameters() for shape in fitting()}
    off = [abs(c.architecture.parameters() - TARGET.value) for c in found.candidates]
    assert off == sorted(off)  # without scores the closest first
    assert found.front == []


def test_the_best_by_the_proxy_come_first_and_the_front_is_what_nothing_beats():
    s = scores()
    found = search(SPACE, [TARGET], s, top=10_000)
    kept = {c.name: c.kept for c in found.candidates}
    assert list(kept.values()) == sorted(kept.values(), reverse=True)
    best = search(SPACE, [TARGET], s, top=3)
    assert best.candidates == found.candidates[:3]
    points = [(c.architecture.parameters(), c.kept, c.name) for c in found.candidates]
    front = {n for p, k, n in points if not any((q <= p and j > k) or (q < p and j >= k) for q, j, _ in points)}
    assert {c.name for c in found.front} == front


@pytest.mark.parametrize("rows", [5, 64])
def test_blocks_make_no_difference(rows, monkeypatch):
    whole = search(SPACE, [TARGET], scores())
    monkeypatch.setattr(sys.modules[type(SPACE).__module__].Space.blocks, "__defaults__", (rows,))
    assert search(SPACE, [TARGET], scores()) == whole
    with pytest.raises(InputError, match="the nearest is layers=1, hidden=4, ffn=5, heads=4 with"):
        search(SPACE, [targets.parameters(10)])
    with pytest.raises(InputError, match="the nearest is layers=4, hidden=12, ffn=20, heads=8 with"):
        search(SPACE, [targets.parameters(10**6)])


def test_what_costs_more_and_keeps_no_more_is_not_on_the_front():
    """Half of the neurons score nothing: with them a shape keeps as much as without."""
    s = scores()
    s.tensors["ffn"][:, 10:] = 0
    space = make_space(PICO, bounds={"ffn": (8, 12)}, keep={"layers": 4, "hidden": 12}, divisors=Divisors(1))
    found = search(space, [targets.parameters(PICO.parameters(), 0.9)], s)
    assert [c.sizes["ffn"] for c in found.front] == [8, 9, 10]
    assert [c.sizes["ffn"] for c in found.candidates] == [10, 11, 12, 9, 8]  # of equal ones the earlier


def test_maximal_shapes_fit_inside_no_other():
    found = search(SPACE, [TARGET], scores(), top=10_000, maximal=True)
    every = {lengths(shape, SPACE.axes) for shape in fitting()}
    inside = {a for a in every for b in every - {a} if all(x <= y for x, y in zip(a, b, strict=True))}
    assert {tuple(c.sizes.values()) for c in found.candidates} == every - inside
    assert found.fitting == len(every)


def test_several_targets_all_hold():
    middle = int(np.median([a.memory(batch=1, context=50) for a in fitting()]))
    limit = targets.memory(middle, batch=1, context=50)
    found = search(SPACE, [TARGET, limit], top=10_000)
    expected = {lengths(a, SPACE.axes) for a in fitting() if a.memory(batch=1, context=50) <= middle}
    assert {tuple(c.sizes.values()) for c in found.candidates} == expected
    assert 0 < len(expected) < len(fitting())


@pytest.mark.parametrize(("text", "target", "count"), [(SPACE_8B, 8.27e9, 20), (SPACE_4B, 4.2e9, 18)])
def test_the_papers_spaces(text, target, count):
    """The space of docs/method.md. The published models are among them, and come first: they are the closest."""
    space = make_space(NEMOTRON, lists=parse.lists(text))
    found = search(space, [targets.parameters(int(target))], top=100)
    assert found.fitting == len(found.candidates) == count
    published = {20: (32, 4096, 16384, 48), 18: (32, 3072, 9216, 24)}[count]
    assert tuple(found.candidates[0].sizes.values()) == published


PUBLISHED_8B = """
32-32-12800-5120 32-32-13824-4608 32-48-11520-4608 32-48-16384-4096 31-32-12800-5120 31-32-16128-4608 31-48-13824-4608
31-48-16384-4096 30-32-12800-5120 30-32-16128-4608 30-48-13824-4608 30-48-16384-4096 29-32-12800-5120 29-32-16128-4608
29-48-13824-4608
"""  # 2407.14679's candidates for 8B, as layers-heads-ffn-hidden


def test_the_fifteen_published_candidates_are_found_by_name():
    found = search(make_space(NEMOTRON, lists=parse.lists(SPACE_8B)), [targets.parameters(int(8.27e9))], top=100)
    shapes = [shape.split("-") for shape in PUBLISHED_8B.split()]
    names = {f"layers{layers}-hidden{hidden}-ffn{ffn}-heads{heads}" for layers, heads, ffn, hidden in shapes}
    assert len(names) == 15
    assert names <= {candidate.name for candidate in found.candidates}


def test_a_million_shapes_are_searched_exactly():
    bounds = {"ffn": (512, 1536), "hidden": (448, 576), "layers": (24, 30)}
    space = make_space(smollm2(), bounds=bounds, divisors=Divisors(1))
    assert space.combinations == 1025 * 129 * 7
    exact = smollm2(num_layers=27, hidden_size=500, ffn_hidden_size=1100).parameters()
    found = search(space, [targets.parameters(exact, 0.0)], top=50)
    assert (27, 500, 1100) in {tuple(c.sizes.values()) for c in found.candidates}
    assert {c.architecture.parameters() for c in found.candidates} == {exact}
    with pytest.raises(InputError, match="none of 925,575 shapes has 20,000,000 to 20,000,000 parameters; the nearest"):
        search(space, [targets.parameters(20_000_000, 0.0)])


def test_a_budget_that_nothing_meets_names_the_nearest():
    with pytest.raises(InputError) as caught:
        search(SPACE, [targets.parameters(10, 0.5), targets.flops(10**9, context=4)])
    smallest = min((shape for _, shape in brute_force(PICO, {n: [e[0]] for n, e in BOUNDS.items()})), key=str)
    assert str(caught.value) == (
        f"none of {SPACE.combinations:,} shapes has 5 to 15 parameters and at most 1,000,000,000 FLOPs a token; the "
        f"nearest is layers=1, hidden=4, ffn=5, heads=4 with {smallest.parameters():,} parameters and "
        f"{smallest.flops_per_token(4):,} FLOPs a token"
    )
    with pytest.raises(InputError, match="no shape of the space is legal"):
        search(make_space(PICO, bounds={"heads": (5, 7)}), [TARGET])
    with pytest.raises(InputError, match="there is no target"):
        search(SPACE, [])
    with pytest.raises(InputError, match="the target for parameters is 0; the nearest legal one is 1, and a share"):
        targets.parameters(0)
    with pytest.raises(InputError, match="a tolerance of 150% is not legal"):
        targets.parameters(10, 1.5)


def test_ends_of_a_band_are_exact():
    """100 * 1.15 is 114.99999999999999 in floating point."""
    band = targets.parameters(100, 0.15)
    assert band.ends == (85, 115)
    assert band.misses(np.array([84, 85, 100, 115, 116])).tolist() == [0.01, 0, 0, 0, 0.01]
    assert targets.flops(100).misses(np.array([0, 100, 150])).tolist() == [0, 0, 0.5]


def test_latency_is_measured_only_until_there_are_enough():
    measured = []

    def measure(candidate):
        measured.append(candidate.name)
        return candidate.architecture.num_layers

    every = search(SPACE, [TARGET], scores(), top=10_000)
    fast = [c for c in every.candidates if c.architecture.num_layers <= 2]
    found = search(SPACE, [TARGET], scores(), top=3, latency=(2, measure))
    assert found.candidates == fast[:3]
    assert measured == [c.name for c in every.candidates[: every.candidates.index(fast[2]) + 1]]
    with pytest.raises(InputError, match=r"none of the best 64 shapes takes at most 0.5; the nearest is layers="):
        search(SPACE, [TARGET], scores(), latency=(0.5, measure))


# -- the proxy -------------------------------------------------------------------------------------------------


def test_shares_by_hand():
    s = scores()
    proxy = make_proxy(s, ("layers", "hidden", "ffn", "heads"))
    best = -np.sort(-s["ffn"].astype(float), axis=1)
    ffn = (best[:, :7].sum(1) / best.sum(1)).mean()
    groups = -np.sort(-s["heads"].astype(float).reshape(16, 2), axis=1)  # four layers of four groups
    heads = (groups[:, 0] / groups.sum(1)).mean()
    hidden, layers = (-np.sort(-s[name].astype(float)) for name in ("hidden", "layers"))
    by_hand = (hidden[:5].sum() / hidden.sum()) ** WEIGHTS["hidden"] * ffn * heads ** WEIGHTS["heads"]
    by_hand *= (layers[:3].sum() / layers.sum()) ** WEIGHTS["layers"]
    sizes = {"layers": [3, 4], "hidden": [5, 12], "ffn": [7, 20], "heads": [4, 8]}
    assert proxy({n: np.array(v) for n, v in sizes.items()}) == pytest.approx([by_hand, 1.0], rel=1e-12)


def test_heads_are_counted_within_the_groups_that_stay():
    s = scores()
    proxy = make_proxy(s, ("heads", "query_groups"))
    whole = proxy({"heads": np.array([4]), "query_groups": np.array([2])})  # two groups of two heads
    assert whole == pytest.approx(proxy.shares["query_groups"][2], rel=1e-12)


def test_what_nobody_met_is_kept_evenly():
    s = scores()
    s.tensors["ffn"][:] = 0
    assert make_proxy(s, ("ffn",)).shares["ffn"][5] == pytest.approx(0.25)


def test_layers_by_another_criterion():
    """Only what was scanned can be planned: shapes of other depths are none."""
    s = scores()
    s.tensors["layers"][:] = [4, 1, 2, 3]
    s.depth["loss"] = {(0, -1): 1.0, **{(i, i + 1): float(i) for i in range(3)}}
    shares = make_proxy(s, ("layers",), depth="loss").shares["layers"]
    assert np.isnan(shares[[1, 3]]).all()
    assert shares[[2, 4]].tolist() == [0.5, 1.0]  # layers 0 and 1 go, half of the influence
    found = search(SPACE, [TARGET], s, depth="loss", top=10_000)
    assert {c.architecture.num_layers for c in found.candidates} == {2, 4}
    made = plan(s, cut_of(found.candidates[0], PICO), depth="loss")
    assert made.target == found.candidates[0].architecture
    with pytest.raises(InputError, match="no depth criterion 'los'; did you mean 'loss'"):
        search(SPACE, [TARGET], s, depth="los")


def test_a_candidate_is_a_plan(tmp_path):
    s = scores()
    for candidate in search(SPACE, [TARGET], s).candidates:
        assert plan(s, cut_of(candidate, PICO)).target == candidate.architecture
    without = Scores(PICO, {n: t for n, t in s.tensors.items() if n != "ffn"})
    with pytest.raises(InputError, match="these scores have no 'ffn'"):
        search(SPACE, [TARGET], without)
