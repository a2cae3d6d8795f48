"""Draws of the cached teacher: their expectation, their generator, and what a position keeps of them.

A draw is a function of one number in [0, 1), so its expectation is an integral over that number, and where all borders
of the cumulative distribution are multiples of 1/M the mean over M midpoints is that integral, without a tolerance for
chance. Mutations tried by hand, each of which makes tests here fail: p / q the other way round; tokens searched from
the left, at a border; the cumulative sum without a token's own mass.
"""

import numpy as np
import pytest
import torch
from tolerances import SAMPLE_RATIO_FP32

from nemo_minitron.artifacts.cache_settings import CacheSettings
from nemo_minitron.distillation.cache import draw, top, uniforms
from nemo_minitron.distillation.cache.sampling import CHUNK, ragged

GRID = 64
MASSES = torch.tensor([1, 0, 13, 2, 31, 1, 16, 0]) / GRID  # of the proposal: multiples of 1/64, two never drawn
HEATS = [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (1.5, 0.5)]  # temperature, proposal temperature


def midpoints(rows=1):
    return ((torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID).expand(rows, -1)


def target(logits, temperature):
    return (logits.double() / temperature).softmax(-1)


@pytest.mark.parametrize(("temperature", "proposal"), HEATS)
def test_the_expected_target_is_the_teachers_distribution(temperature, proposal):
    """Over every part of [0, 1): sum of count / draws * p / q is p, of each token that can be drawn."""
    logits = (MASSES.double().log() * temperature * proposal).float()[None]
    tokens, ratios = draw(logits, midpoints(), temperature, proposal)
    counts = torch.bincount(tokens[0], minlength=len(MASSES))
    assert torch.equal(counts / GRID, MASSES)  # the proposal itself, exactly
    weights = torch.ones(GRID, dtype=torch.float64) if ratios is None else ratios[0].double()
    mean = torch.zeros(len(MASSES), dtype=torch.float64).index_add(0, tokens[0], weights / GRID)
    assert (ratios is None) == (proposal == 1.0)
    assert (mean - target(logits[0], temperature)).abs().max() < SAMPLE_RATIO_FP32


def test_a_border_belongs_to_the_token_above_it():
    """So that each token's part is closed below, and one without mass is never drawn, also not at 1.0. The masses
    are quarters, so the borders are exact."""
    logits = torch.tensor([[0.0, -torch.inf, 0.0, 0.0, -torch.inf, 0.0, -torch.inf]])
    tokens, _ = draw(logits, torch.tensor([[0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 1.0]], dtype=torch.float64))
    assert tokens[0].tolist() == [0, 0, 2, 3, 3, 5, 5]


@pytest.mark.parametrize("independent", [False, True])
def test_numbers_depend_on_seed_row_and_set_alone(independent):
    settings = CacheSettings(sequence_length=33, draws=16, seed=5, independent=independent)
    base = uniforms(settings, 2**64 - 1, 0)
    assert base.shape == (33, 16)
    assert np.array_equal(base, uniforms(settings, 2**64 - 1, 0))
    others = [uniforms(settings, 2**64 - 2, 0), uniforms(settings, 2**64 - 1, 1)]
    others.append(uniforms(CacheSettings(sequence_length=33, draws=16, seed=6, independent=independent), 2**64 - 1, 0))
    assert all((base != other).all() for other in others)
    assert (np.diff(base, axis=1) >= 0).all()
    strata = (base * 16).astype(int)
    assert (strata == np.arange(16)).all() == (not independent)


def test_one_draw_from_each_part_keeps_every_count_within_two_of_its_mean():
    """Each of a token's two borders cuts one part; all parts between them are its own. Independent draws stray."""
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(1)) * 3
    means = 200 * target(logits, 1.0)
    far = []
    for independent in (False, True):
        settings = CacheSettings(sequence_length=40, draws=200, independent=independent)
        tokens, _ = draw(logits, torch.from_numpy(uniforms(settings, 9, 0)))
        counts = torch.zeros(40, 300, dtype=torch.float64).scatter_add(1, tokens, torch.ones(40, 200).double())
        far.append((counts - means).abs().max().item())
    assert far[0] < 2 < far[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratios_are_those_of_float64(dtype):
    logits = (torch.randn(9, 509, generator=torch.Generator().manual_seed(2)) * 4).to(dtype)
    numbers = torch.from_numpy(uniforms(CacheSettings(sequence_length=9, draws=30), 1, 0))
    tokens, ratios = draw(logits, numbers, 1.5, 2.0)
    expected = (target(logits, 1.5) / target(logits, 3.0)).gather(1, tokens)
    assert ((ratios.double() - expected) / expected).abs().max() < SAMPLE_RATIO_FP32


def test_chunks_change_nothing(monkeypatch):
    logits = torch.randn(11, 509, generator=torch.Generator().manual_seed(3)) * 3
    numbers = torch.from_numpy(uniforms(CacheSettings(sequence_length=11, draws=20), 1, 0))
    whole = *draw(logits, numbers, 1.5, 2.0), *top(logits, 7, 1.5)
    monkeypatch.setattr("nemo_minitron.distillation.cache.sampling.CHUNK", 600)
    assert CHUNK > 600
    for a, b in zip(whole, (*draw(logits, numbers, 1.5, 2.0), *top(logits, 7, 1.5)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("k", [1, 10, 508, 509, 600])
def test_the_largest_and_the_mass_of_the_rest(k):
    logits = torch.randn(9, 509, generator=torch.Generator().manual_seed(4)) * 3
    ids, masses, tail = top(logits, k, 1.5)
    p = target(logits, 1.5)
    expected = p.topk(min(k, 509), dim=1)
    assert torch.equal(ids, expected.indices)
    assert (masses - expected.values).abs().max() < SAMPLE_RATIO_FP32
    assert (tail - p.sort(1).values[:, : max(0, 509 - k)].sum(1)).abs().max() < SAMPLE_RATIO_FP32
    assert (tail == 0).all() == (k >= 509)


def test_a_small_tail_is_not_lost_in_rounding():
    logits = torch.zeros(1, 100)
    logits[0, 7] = 25.0
    _, _, tail = top(logits, 1)
    expected = 1 - target(logits, 1.0)[0, 7]
    assert tail.item() == pytest.approx(99 * np.exp(-25.0) / (1 + 99 * np.exp(-25.0)), rel=1e-5)
    assert expected < 2e-9  # float32's 1 - p would be 0 here


def test_a_position_keeps_each_token_once():
    tokens = np.array([[3, 3, 5, 5, 5], [9, 0, 9, 0, 1]])
    factors = np.array([[0.3, 0.3, 0.5, 0.5, 0.5], [0.9, 0.1, 0.9, 0.1, 0.2]], np.float32)
    lengths, ids, counts, kept = ragged(tokens, factors)
    assert (lengths.tolist(), ids.tolist(), counts.tolist()) == ([2, 3], [3, 5, 0, 1, 9], [2, 3, 2, 1, 2])
    assert np.array_equal(kept, np.array([0.3, 0.5, 0.1, 0.2, 0.9], np.float32))
    assert ragged(tokens, None)[3] is None
