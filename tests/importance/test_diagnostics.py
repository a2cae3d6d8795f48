"""A calibration says what looks wrong with it, and names the layer."""

import sys
from pathlib import Path

import numpy as np
import pytest

from nemo_minitron.errors import InputError
from nemo_minitron.importance.diagnostics import check_finite, remarks, split_half

sys.path.insert(0, str(Path(__file__).parents[1] / "artifacts"))
from test_criteria import mixture_scores, samples, scores


def test_nothing_to_remark_on_a_stable_ranking():
    values = samples(1)
    same = {
        name: np.repeat(v, 40, 0) + np.random.default_rng(1).normal(0, 1e-4, (40, *v.shape[1:]))
        for name, v in values.items()
    }
    made = scores(same)
    assert min(split_half(made).values()) > 0.99
    assert remarks(made) == []


def test_noise_is_called_unstable():
    made = scores(samples(4, seed=7))
    correlations = split_half(made)
    assert set(correlations) == {"ffn", "heads", "query_groups", "hidden", "layers"}
    assert any("ffn: the rankings of two halves" in line for line in remarks(made))


def test_split_half_is_spearman_of_disjoint_halves():
    values = samples(6)
    made = scores(values)
    even, odd = (np.sqrt((values["ffn"][k::2] ** 2).sum(0)) for k in (0, 1))
    ranks = [np.argsort(np.argsort(x, axis=1), axis=1) for x in (even, odd)]
    expected = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)])
    assert split_half(made)["ffn"] == pytest.approx(expected, abs=1e-9)


def test_one_half_without_samples_has_no_correlation():
    made = scores(samples(1))
    assert split_half(made) == {}


def test_dead_units_and_idle_layers():
    made = scores(samples(6))
    made.tensors["ffn"][1, [2, 5]] = 0
    made.tensors["heads"][2, 0] = 0
    made.tensors["layers"][0] = 0
    lines = remarks(made)
    assert "layer 1: 2 of 8 neurons were never active" in lines
    assert "layer 2: 1 of 9 heads were never active" in lines
    assert "layer 0: its output equals its input" in lines


@pytest.mark.parametrize(
    ("statistic", "row", "words"),
    [
        ("ffn/l2,mean/sum_of_squares", 1, "'ffn' are not finite from layer 1 on"),
        ("norms/mean,mean/sum", 3, "'norms' are not finite from layer 1's pre-MLP norm on"),
        ("norms/mean,mean/sum", 6, "from the final norm on"),
    ],
)
def test_the_first_layer_that_is_not_finite_is_named(statistic, row, words):
    kept = scores(samples(4)).states
    kept[statistic][row:, 0, 2] = np.inf
    with pytest.raises(InputError, match=words):
        check_finite(kept)


def test_dead_experts_and_neurons_of_experts():
    """Layer 0 of the mixture is dense: its rows are zeros and nothing is dead there."""
    made = mixture_scores(6)
    assert not any("never active" in line for line in remarks(made))
    made.tensors["experts"][2, [0, 3]] = 0
    made.tensors["expert_ffn"][1, 2, :3] = 0
    made.tensors["shared_expert_ffn"][2] = 0
    lines = remarks(made)
    assert "layer 2: 2 of 4 experts were never active" in lines
    assert "layer 1: 3 of 20 neurons of its experts were never active" in lines
    assert "layer 2: 7 of 7 neurons of its shared expert were never active" in lines
    assert not any(line.startswith("layer 0") for line in lines)


def test_experts_are_ranked_in_both_halves():
    made = mixture_scores(40, noise=1e-4)
    assert {"experts", "expert_ffn", "shared_expert_ffn"} <= split_half(made).keys()
    assert min(split_half(made).values()) > 0.99
    noisy = mixture_scores(4, noise=1.0)
    assert any(line.startswith("expert_ffn: the rankings of two halves") for line in remarks(noisy))


def test_an_expert_that_is_not_finite_is_named():
    kept = mixture_scores(4).states
    kept["expert_ffn/routed,mean/sum"][2, 1, 3, 0] = np.nan
    with pytest.raises(InputError, match="'expert_ffn' are not finite from layer 2, expert 3, on"):
        check_finite(kept)
