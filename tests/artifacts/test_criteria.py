"""Scores of one pass under other criteria, of two runs together, and of halves: from the states in the file."""

import numpy as np
import pytest
from test_scores_file import ARCHITECTURE

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Scores, criteria
from nemo_minitron.artifacts.criteria import derive, finish
from nemo_minitron.errors import InputError

RNG = np.random.default_rng(5)


def states(samples):
    """What a pass over per-sample means [samples, ...] keeps under l2,mean and mean,mean; halves are even and odd."""
    found = {}
    for statistic, values in samples.items():
        halves = values[0::2], values[1::2]
        if statistic == "layers":
            found["layers/tokens,mean/sum"] = np.stack([h.sum(0) for h in halves], 1)
            found["layers/tokens,mean/count"] = np.stack([np.full(h.shape[1:], float(len(h))) for h in halves], 1)
            continue
        found[f"{statistic}/l2,mean/sum_of_squares"] = np.stack([(h**2).sum(0) for h in halves], 1)
        found[f"{statistic}/mean,mean/sum"] = np.stack([h.sum(0) for h in halves], 1)
        found[f"{statistic}/mean,mean/count"] = np.stack([np.full(h.shape[1:], float(len(h))) for h in halves], 1)
    return found


def samples(count, seed=0):
    a, rng = ARCHITECTURE, np.random.default_rng(seed)
    shapes = {"ffn": (a.num_layers, a.ffn_hidden_size), "heads": (a.num_layers, a.num_attention_heads)}
    shapes |= {"norms": (2 * a.num_layers + 1, a.hidden_size), "layers": (a.num_layers,)}
    return {name: rng.random((count, *shape)) for name, shape in shapes.items()}


def scores(values):
    kept = states(values)
    tensors = derive(finish(kept, "l2,mean"), ARCHITECTURE)
    count = len(values["ffn"])
    return Scores(ARCHITECTURE, tensors, samples=count, tokens=count * 8, model_digest="m", states=kept)


MIXTURE = Architecture(
    num_layers=3, hidden_size=6, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=1, head_dim=2,
    vocab_size=11, num_moe_experts=4, moe_ffn_hidden_size=5, moe_shared_expert_intermediate_size=7,
    moe_layer_freq=(0, 1, 1),
)  # fmt: skip


def mixture_scores(count, noise=0.1):
    """Scores of a model whose layers 1 and 2 are mixtures; every sample sends a token to every expert."""
    generator, found = np.random.default_rng(2), {}
    for name, shape, pair in (
        ("experts", (3, 4), "routed,mean"), ("expert_ffn", (3, 4, 5), "routed,mean"),
        ("shared_expert_ffn", (3, 7), "mean,mean"),
    ):  # fmt: skip
        values = generator.random(shape) + noise * generator.random((count, *shape))
        values[:, 0] = 0  # the dense layer
        halves = values[0::2], values[1::2]
        found[f"{name}/{pair}/sum"] = np.stack([half.sum(0) for half in halves], 1)
        found[f"{name}/{pair}/count"] = np.stack([np.full(shape, float(len(half))) for half in halves], 1)
    return Scores(MIXTURE, finish(found, "mean,mean"), criterion="mean,mean", states=found)


def test_routed_tokens_have_any_criterion_of_their_aggregation_over_the_sequence():
    made = mixture_scores(6)
    assert made.criteria == ["mean,mean"]
    np.testing.assert_array_equal(made.under("mean,mean")["experts"], made["experts"])
    alone = Scores(MIXTURE, {}, states={k: v for k, v in made.states.items() if k.startswith("experts")})
    assert alone.criteria == ["mean,mean", "l2,mean", "var,mean", "max,mean"]
    np.testing.assert_array_equal(alone.under("l2,mean")["experts"], made["experts"])
    with pytest.raises(InputError, match="'mean,l2' was not gathered"):
        alone.under("mean,l2")
    twice = made.merge(made)
    np.testing.assert_allclose(twice["expert_ffn"], made["expert_ffn"], rtol=1e-6)


def test_under_another_criterion_after_a_round_trip(tmp_path):
    values = samples(6)
    scores(values).save(tmp_path / "s.safetensors")
    loaded = Scores.load(tmp_path / "s.safetensors")
    assert loaded.criteria == ["l2,mean", "mean,mean"]
    np.testing.assert_allclose(loaded["ffn"], np.sqrt((values["ffn"] ** 2).sum(0)), rtol=1e-6)
    mean = loaded.under("mean,mean")
    assert mean.criterion == "mean,mean"
    np.testing.assert_allclose(mean["ffn"], values["ffn"].mean(0), rtol=1e-6)
    np.testing.assert_allclose(mean["layers"], values["layers"].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(mean.under("l2,mean")["heads"], loaded["heads"])
    assert mean.under("l2,mean").digest == loaded.digest


def test_hidden_of_all_norms_or_of_the_layers_alone():
    made = scores(samples(6))
    np.testing.assert_allclose(made["hidden"], made["norms"].sum(0), rtol=1e-6)
    without = made.under("l2,mean", norms="layers")
    np.testing.assert_allclose(without["hidden"], made["norms"][:-1].sum(0), rtol=1e-6)
    with pytest.raises(InputError, match="norms 'final' is unknown"):
        made.under("l2,mean", norms="final")


def test_two_runs_together():
    values = samples(10)
    parts = [{n: v[:4] for n, v in values.items()}, {n: v[4:] for n, v in values.items()}]
    merged, whole = scores(parts[0]).merge(scores(parts[1])), scores(values)
    assert (merged.samples, merged.tokens) == (10, 80)
    for name in whole.tensors:
        np.testing.assert_allclose(merged[name], whole[name], rtol=1e-6)


def test_a_score_that_no_statistic_is_behind_stays():
    made = scores(samples(4))
    made.tensors["vocab"] = np.ones(11, np.float32)
    assert "vocab" in made.under("mean,mean")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: setattr(s, "model_digest", "other"), "different models"),
        (lambda s: s.states.pop("ffn/l2,mean/sum_of_squares"), "only one has 'ffn/l2,mean'"),
        (lambda s: setattr(s, "method", "taylor"), "by 'activation' and by 'taylor' do not merge"),
    ],
)
def test_runs_that_do_not_fit_are_refused(change, words):
    a, b = scores(samples(4)), scores(samples(4, seed=1))
    change(b)
    with pytest.raises(InputError, match=words):
        a.merge(b)


def test_a_criterion_that_was_not_gathered_is_refused():
    with pytest.raises(InputError, match="'l2,var' was not gathered; these scores have l2,mean and mean,mean"):
        scores(samples(4)).under("l2,var")
    with pytest.raises(InputError, match="is not a state of a statistic"):
        criteria.pairs_of({"ffn/sum": np.zeros(3)})
