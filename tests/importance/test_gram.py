"""Gram matrices of what goes into `down` and `o`: transformers in float64, in every layout.

Mutations tried by hand, each of which makes tests here fail: the sum over context-parallel ranks left out; masked
positions counted; a rank's own channels multiplied with themselves alone (TP). Of experts: tokens that tensor-parallel
ranks send twice counted twice; experts numbered by their place on the rank; their sums not taken, or over the dense
layers' data-parallel ranks; a grouped linear's experts in the other order. Gathered over the dense layers'
tensor-parallel ranks, they wait until the time is up. Of halves: the rows of tensor-parallel ranks joined as if they
were halves.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from grams64 import grams64
from pico import pico_llama, pico_mixtral
from ranks import run_ranks
from tolerances import GRAM_FP32

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "gram_worker.py"
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4}
LAYOUTS = {  # model -> world size -> layouts; a new layout is one entry
    "dense": {
        1: [{}],
        2: [{"tp": 2}, {"tp": 2, "sp": True}, {"pp": 2}, {"pp": 2, "vp": 3}, {"dp": 2}, {"cp": 2}],
        4: [{"tp": 2, "pp": 2, "sp": True}, {"tp": 2, "cp": 2}],
    },
    "mixture": {
        1: [{}],
        2: [
            {"dp": 2},
            {"cp": 2},
            {"ep": 2, "dp": 2},
            {"ep": 2, "cp": 2, "etp": 1},
            {"tp": 2, "etp": 1},
            {"tp": 2, "etp": 2},
            {"tp": 2, "ep": 2, "etp": 1, "sp": True},
            {"pp": 2},
        ],
        4: [{"tp": 2, "dp": 2, "ep": 2, "etp": 2, "sp": True}],
    },
    "grouped": {2: [{"ep": 2, "dp": 2}, {"tp": 2, "etp": 2, "sp": True}]},  # as Transformer Engine's experts are
}
CASES = [
    {"name": model + "".join(f"-{k}{v}" for k, v in layout.items()), "model": model, "layout": layout, "world": world}
    for model, worlds in LAYOUTS.items()
    for world, layouts in worlds.items()
    for layout in layouts
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """8 rows of 23 tokens, which neither SP nor CP divides, and masks of unlike lengths."""
    folder = tmp_path_factory.mktemp("models")
    pico_llama(folder / "dense", **SIZES)
    pico_mixtral(folder / "mixture", **SIZES)
    (folder / "grouped").symlink_to(folder / "mixture")
    np.save(folder / "tokens.npy", np.random.default_rng(5).integers(0, 509, (8, 23)))
    mask = np.arange(23) < np.array([22, 3, 17, 2, 23, 5, 20, 9])[:, None]
    mask[4, :7] = False
    np.save(folder / "mask.npy", mask)
    return folder


@pytest.fixture(scope="module")
def expected(models):
    """Model -> its matrices."""
    tokens, mask = (np.load(models / f"{name}.npy") for name in ("tokens", "mask"))
    second = mask & (dealt(tokens, mask) == 1)[:, None]
    assert 0 < second.sum() < mask.sum()
    of_half = {name: grams64(models / name, tokens, second) for name in LAYOUTS}
    whole = {name: grams64(models / name, tokens, mask) for name in LAYOUTS}
    return {m: whole[m] | {f"{name} of the second half": g for name, g in of_half[m].items()} for m in LAYOUTS}


def dealt(tokens, mask):
    """The half of each row: a hash of the tokens that count, and of their positions."""
    mixed = ((tokens + 1) * (2 * np.arange(tokens.shape[1]) + 1) * 2654435761) % 1000003
    return (mixed * mask).sum(1) % 2


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """Case -> its matrices; one torchrun for all layouts of a world size."""
    done = {}

    def of(case):
        world = case["world"]
        if world not in done:
            out = tmp_path_factory.mktemp(f"world{world}")
            cases = json.dumps([case for case in CASES if case["world"] == world])
            run_ranks(world, WORKER, models, cases, out)
            done[world] = out
        return np.load(done[world] / f"{case['name']}.npz")

    return of


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_every_layout_equals_transformers_in_float64(case, results, expected):
    found, wanted = results(case), expected[case["model"]]
    assert set(found) == set(wanted)
    for name, gram in wanted.items():
        scale = np.abs(gram).max()
        np.testing.assert_allclose(found[name], gram, rtol=0, atol=GRAM_FP32 * scale, err_msg=name)
