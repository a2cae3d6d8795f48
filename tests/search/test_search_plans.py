"""Which units a plan keeps."""

import numpy as np
import pytest
from test_architecture import smollm2

from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.scores import expected_shapes
from nemo_minitron.errors import InputError
from nemo_minitron.search import plan, random_plan

SIZES = {"num_layers": 4, "hidden_size": 12, "ffn_hidden_size": 20, "num_attention_heads": 6, "head_dim": 2}
SOURCE = smollm2(**SIZES, vocab_size=11)
ALL = {"ffn": 9, "hidden": 7, "layers": 3, "heads": 3}


def scores(seed=0, without=("query_groups",)):
    generator = np.random.default_rng(seed)
    tensors = {n: generator.random(s, np.float32) for n, s in expected_shapes(SOURCE).items()}
    return Scores(SOURCE, {n: t for n, t in tensors.items() if n not in without}, model_digest="ab")


def largest(values, count):
    """By sorting pairs: the largest first, of equal ones the lower index."""
    return sorted(i for _, i in sorted((-v, i) for i, v in enumerate(values.tolist()))[:count])


def test_the_most_important_stay():
    s = scores()
    made = plan(s, ALL)
    sizes = {"ffn_hidden_size": 9, "hidden_size": 7, "num_layers": 3, "num_attention_heads": 3}
    assert made.target == SOURCE.replace(**sizes)
    assert made.keep["hidden"] == largest(s["hidden"], 7)
    assert made.keep["layers"] == largest(s["layers"], 3)
    assert sorted(made.keep["ffn"]) == sorted(made.keep["heads"]) == made.keep["layers"]
    for layer in made.keep["layers"]:  # by the scores of that source layer
        assert made.keep["ffn"][layer] == largest(s["ffn"][layer], 9)
        expected = [2 * g + largest(s["heads"][layer][2 * g : 2 * g + 2], 1)[0] for g in range(3)]
        assert made.keep["heads"][layer] == expected
    assert made.model_digest == "ab"
    assert made.notes["scores"] == s.digest
    assert made.notes["criterion"] == "l2,mean"


def test_dropped_layers_do_not_shift_scores():
    s = scores()
    s.tensors["ffn"][:] = 0
    for layer in range(4):
        s.tensors["ffn"][layer, layer] = 1
    made = plan(s, {"layers": [1, 3], "ffn": 1})
    assert made.keep["ffn"] == {1: [1], 3: [3]}


def test_windows_of_the_layers_that_stay():
    """A plan knows which layers it keeps, and so what their KV cache costs."""
    s = scores()
    s.architecture = SOURCE.replace(attention_window=8, window_attn_skip_freq=(1, 0, 1, 0))
    s.tensors["layers"][:] = [1, 2, 3, 0]
    made = plan(s, {"layers": 2})
    assert made.keep["layers"] == [1, 2]
    assert (made.target.attention_window, made.target.window_attn_skip_freq) == (8, (0, 1))


def test_whole_groups_by_their_own_scores_or_their_heads():
    s = scores()
    s.tensors["heads"][:] = [5, 1, 3, 4, 0, 1]  # sums 6, 7, 1
    made = plan(s, {"query_groups": 1})
    assert made.keep["query_groups"] == {layer: [1] for layer in range(4)}
    assert made.keep["heads"] == {layer: [2, 3] for layer in range(4)}
    assert (made.target.num_query_groups, made.target.num_attention_heads) == (1, 2)
    s.tensors["query_groups"] = np.tile(np.float32([1, 2, 3]), (4, 1))
    assert plan(s, {"query_groups": 2}).keep["query_groups"][0] == [1, 2]
    both = plan(s, {"query_groups": 2, "heads": 2})
    assert both.keep["heads"][0] == [3, 5]


def test_ties_keep_the_lower_index():
    s = scores()
    for array in s.tensors.values():
        array[...] = 1
    for least in (False, True):
        made = plan(s, ALL, least=least)
        assert made.keep["ffn"][0] == list(range(9))
        assert made.keep["hidden"] == list(range(7))
        assert made.keep["layers"] == [0, 1, 2]
        assert made.keep["heads"][0] == [0, 2, 4]


def test_least_important():
    s = scores()
    least, most = plan(s, ALL, least=True), plan(s, ALL)
    assert least.keep["hidden"] == largest(-s["hidden"], 7)
    assert least.keep["layers"] == largest(-s["layers"], 3)
    for layer in set(least.keep["layers"]) & set(most.keep["layers"]):
        assert not set(least.keep["heads"][layer]) & set(most.keep["heads"][layer])
        assert least.keep["ffn"][layer] == largest(-s["ffn"][layer], 9)
    assert least.target == most.target


def test_what_is_not_cut_is_absent_and_needs_no_scores():
    s = scores(without=("query_groups", "hidden", "layers", "heads"))
    made = plan(s, {"ffn": 9, "hidden": 12, "layers": 4, "heads": 6})
    assert list(made.keep) == ["ffn"]
    assert plan(s, {}).keep == {}
    with pytest.raises(InputError, match="no 'hidden'"):
        plan(s, {"hidden": 11})
    with pytest.raises(InputError, match="no 'heads'"):
        plan(s, {"query_groups": 2})


def test_listed_layers():
    s = scores(without=("query_groups", "layers"))
    assert plan(s, {"layers": [3, 0]}).keep == {"layers": [0, 3]}
    assert plan(s, {"layers": (0, 1, 2, 3)}).keep == {}
    assert random_plan(SOURCE, {"layers": [2]}).kept_layers == [2]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"fnn": 9}, "no axis 'fnn'; did you mean 'ffn'"),
        ({"head_dim": 1}, "no axis 'head_dim'"),
        ({"ffn": 21}, "ffn=21 is not legal; legal are 1 to 20, the nearest is 20"),
        ({"ffn": 0}, "ffn=0 is not legal; legal are 1 to 20, the nearest is 1"),
        ({"hidden": -3}, "hidden=-3 is not legal; legal are 1 to 12, the nearest is 1"),
        ({"hidden": 7.0}, "hidden=7.0 is not legal; legal are whole numbers from 1 to 12"),
        ({"hidden": "7"}, "whole numbers"),
        ({"hidden": True}, "whole numbers"),
        ({"hidden": None}, "whole numbers"),
        ({"hidden": [1, 2]}, "whole numbers"),
        ({"layers": 5}, "layers=5 is not legal; legal are 1 to 4, the nearest is 4"),
        ({"layers": [0, 4]}, "legal are layer numbers from 0 to 3"),
        ({"layers": [-1]}, "layer numbers"),
        ({"layers": [0, 0]}, "none twice"),
        ({"layers": []}, "at least one layer"),
        ({"layers": "01"}, "layer numbers"),
        ({"heads": 4}, "heads=4 is not legal with 3 query groups of 2 heads; legal are multiples of 3"),
        ({"heads": 4}, "multiples of 3 up to 6, the nearest is 3"),
        ({"heads": 5, "query_groups": 2}, "multiples of 2 up to 4, the nearest is 4"),
        ({"heads": 6, "query_groups": 2}, "multiples of 2 up to 4, the nearest is 4"),
        ({"heads": 7}, "legal are 1 to 6, the nearest is 6"),
    ],
)  # fmt: skip
def test_illegal_sizes(keep, message):
    for make in (lambda: plan(scores(), keep), lambda: random_plan(SOURCE, keep)):
        with pytest.raises(InputError) as caught:
            make()
        assert message in str(caught.value)


def test_random_is_seeded_and_independent_by_axis():
    whole = random_plan(SOURCE, ALL, seed=3)
    assert random_plan(SOURCE, ALL, seed=3) == whole
    assert random_plan(SOURCE, ALL, seed=4).keep != whole.keep
    alone = random_plan(SOURCE, {"ffn": 9}, seed=3)
    for layer in whole.keep["layers"]:
        assert whole.keep["ffn"][layer] == alone.keep["ffn"][layer]
    assert random_plan(SOURCE, {"hidden": 7}, seed=3).keep["hidden"] == whole.keep["hidden"]
    assert random_plan(SOURCE, {"layers": 3}, seed=3).keep["layers"] == whole.keep["layers"]
    assert len({tuple(kept) for kept in alone.keep["ffn"].values()}) == 4
    assert whole.model_digest is None
    with pytest.raises(InputError, match="the nearest is 0"):
        random_plan(SOURCE, ALL, seed=-1)


def test_random_is_uniform():
    """Each of 20 neurons stays in 9 of 20 draws: 1,000 seeds x 4 layers, within five standard deviations."""
    counts, heads = np.zeros(20), np.zeros(6)
    for seed in range(1000):
        made = random_plan(SOURCE, {"ffn": 9, "heads": 3}, seed=seed)
        for layer in range(4):
            counts[made.keep["ffn"][layer]] += 1
            heads[made.keep["heads"][layer]] += 1
    assert np.abs(counts - 4000 * 0.45).max() < 5 * np.sqrt(4000 * 0.45 * 0.55)
    assert np.abs(heads - 4000 * 0.5).max() < 5 * np.sqrt(4000 * 0.25)


def test_the_same_plan_for_ever():
    """Plans in old run folders can be made again: PCG64's stream and the ranking are fixed."""
    made = random_plan(SOURCE, {"ffn": 3, "hidden": 4, "layers": 2}, seed=7)
    ffn = {1: [0, 1, 17], 3: [1, 5, 17]}
    assert made.keep == {"layers": [1, 3], "hidden": [3, 5, 6, 7], "ffn": ffn}
