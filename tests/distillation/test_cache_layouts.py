"""The cached teacher under tensor, sequence, context, pipeline, data and expert parallelism, in real processes.

Draws are checked against the float64 cumulative distribution of one process's logits: each is the token that its
number gives, but where the number lies within rounding of a border. Mutations tried by hand, each of which makes tests
here fail: positions of context-parallel ranks left in their dealt order; the first column of a rank taken without the
vocabulary's padding; data-parallel ranks that stop when they have no shard left, or run as many micro-batches as
their own shard has (ep2's collectives fail); statistics of a loss summed without the shift to the common maximum.
"""

import json
from pathlib import Path

import cache_worker
import main_grad
import numpy as np
import pytest
from ranks import run_ranks
from tolerances import FUSED_FP32, GRADIENT_BF16, KL_FP32, KL_GRADIENT_FP32, SAMPLE_BORDER_FP32

from nemo_minitron.artifacts.logit_cache import LogitCache, row_key
from nemo_minitron.distillation.cache import uniforms

pytestmark = pytest.mark.slow
WORKER = Path(cache_worker.__file__)
LAYOUTS = [
    pytest.param(world, name, kind, id=name)
    for world, layouts in cache_worker.LAYOUTS.items()
    for name, (kind, _, _) in layouts.items()
]
each_layout = pytest.mark.parametrize(("world", "name", "kind"), LAYOUTS)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """World size -> the folder of its results; one torchrun for all layouts of a world size."""
    done = {}

    def of(world):
        if world not in done:
            out = tmp_path_factory.mktemp(f"world{world}")
            done[world] = out
            run_ranks(world, WORKER, out)
        return done[world]

    return of


@pytest.mark.parametrize(("world", "name"), [(2, "dp2"), (4, "tp4")])
def test_logits_that_are_no_numbers_are_refused_on_every_rank(world, name, results):
    for rank in range(world):
        assert (
            (results(world) / f"{name}-nan-{rank}")
            .read_text()
            .startswith("the teacher's logits are not finite in fp32")
        )
    assert not (results(world) / f"{name}-nan").exists()


def target(logits, temperature):
    """float64 softmax."""
    e = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return e / e.sum(-1, keepdims=True)


def within(cumulative, numbers):
    """The least and the largest token that each number may give, its border moved by the tolerance."""
    return (np.searchsorted(cumulative, numbers + by, side="right") for by in (-SAMPLE_BORDER_FP32, SAMPLE_BORDER_FP32))


@each_layout
@pytest.mark.parametrize("mode", ["sample", "heat"])
def test_draws_are_those_of_one_process_in_float64(world, name, kind, mode, results):
    folder, given = results(world), cache_worker.settings(mode)
    cache, logits = LogitCache(folder / f"{name}-{mode}"), np.load(folder / f"{kind}-logits.npy").astype(np.float64)
    p = target(logits, given.temperature)
    q = target(logits, given.temperature * given.proposal_temperature)
    moved = 0
    for row, tokens in enumerate(cache_worker.rows(mode).numpy()):
        assert cache.find(tokens) == row
        for number in range(given.sets):
            kept = cache.read(row, number)
            at = np.repeat(np.arange(given.sequence_length), kept.lengths)
            assert (np.bincount(at, kept.counts) == given.draws).all()
            if given.proposal_temperature != 1:
                assert np.allclose(kept.factors, (p / q)[row, at, kept.ids], rtol=10 * SAMPLE_BORDER_FP32, atol=0)
            drawn = np.repeat(kept.ids, kept.counts).reshape(-1, given.draws)  # in the order of their numbers
            for position, numbers in enumerate(uniforms(given, row_key(tokens), number)):
                least, most = within(q[row, position].cumsum(), numbers)
                assert (least <= drawn[position]).all()
                assert (drawn[position] <= most).all()
                moved += (drawn[position] != np.searchsorted(q[row, position].cumsum(), numbers, side="right")).sum()
    print(f"{name} {mode}: {moved} draws lie within rounding of a border and fell to its other side")


@each_layout
def test_the_largest_are_those_of_one_process_in_float64(world, name, kind, results):
    folder, given = results(world), cache_worker.settings("top-k")
    cache, logits = LogitCache(folder / f"{name}-top-k"), np.load(folder / f"{kind}-logits.npy").astype(np.float64)
    for row, p in enumerate(target(logits, given.temperature)):
        kept = cache.read(row)
        ids = kept.ids.reshape(-1, given.k)
        assert (kept.lengths == given.k).all()
        assert all(len(set(position)) == given.k for position in ids)
        own = np.take_along_axis(p, ids, axis=1)
        assert (own > np.sort(p, axis=1)[:, -given.k, None] - SAMPLE_BORDER_FP32).all()
        assert np.abs(kept.factors.reshape(ids.shape) - own).max() < SAMPLE_BORDER_FP32
        assert np.abs(kept.tail - (1 - own.sum(1))).max() < SAMPLE_BORDER_FP32


@pytest.mark.parametrize("world", cache_worker.LAYOUTS)
def test_losses_on_shards_equal_the_whole(world, results):
    for rank in range(world):
        found = json.loads((results(world) / f"losses-{rank}.json").read_text())
        for case, result in zip(cache_worker.SHARDED, found, strict=True):
            _, _, temperature, dtype = case
            bf16 = GRADIENT_BF16 * result["largest"] if dtype == "bfloat16" else 0
            assert result["value"] < KL_FP32, (rank, case)
            assert result["gradient"] < KL_GRADIENT_FP32 * max(1, temperature) + bf16, (rank, case)


@pytest.mark.parametrize("case", main_grad.CASES)
def test_the_fused_heads_gradient_in_main_grad_is_that_of_autograd(case, results):
    """All of Megatron's buffers after a step, tied and untied heads, while reductions overlap (main_grad.py)."""
    ranks = [json.loads((results(2) / f"main-grad-{rank}.json").read_text())[case] for rank in range(2)]
    assert [rank["used"] for rank in ranks] == [case != "pp2_tied", True]  # the head is on the last stage alone
    for rank in ranks:
        assert rank["least"] > 0
        assert rank["apart"] < FUSED_FP32
