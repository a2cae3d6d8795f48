"""Gram matrices of what goes into `down` and `o`: transformers in float64, in every layout.

Mutations tried by hand, each of which makes tests here fail: the sum over context-parallel ranks left out; masked
positions counted; a rank's own channels multiplied with themselves alone (TP).
"""

import json
from pathlib import Path

import numpy as np
import pytest
from pico import pico_llama
from ranks import run_ranks
from tolerances import GRAM_FP32

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "gram_worker.py"
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4}
LAYOUTS = {  # world size -> layouts; a new layout is one entry
    1: [{}],
    2: [{"tp": 2}, {"tp": 2, "sp": True}, {"pp": 2}, {"pp": 2, "vp": 3}, {"dp": 2}, {"cp": 2}],
    4: [{"tp": 2, "pp": 2, "sp": True}, {"tp": 2, "cp": 2}],
}
CASES = [
    {"name": "four" + "".join(f"-{k}{v}" for k, v in layout.items()), "model": "four", "layout": layout, "world": world}
    for world, layouts in LAYOUTS.items()
    for layout in layouts
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """8 rows of 23 tokens, which neither SP nor CP divides, and masks of unlike lengths."""
    folder = tmp_path_factory.mktemp("models")
    pico_llama(folder / "four", **SIZES)
    np.save(folder / "tokens.npy", np.random.default_rng(5).integers(0, 509, (8, 23)))
    mask = np.arange(23) < np.array([22, 3, 17, 2, 23, 5, 20, 9])[:, None]
    mask[4, :7] = False
    np.save(folder / "mask.npy", mask)
    return folder


@pytest.fixture(scope="module")
def expected(models):
    """By the book: every counted position's input, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / "four", torch_dtype=torch.float64)
    tokens, mask = (torch.from_numpy(np.load(models / f"{name}.npy")) for name in ("tokens", "mask"))
    found = {}

    def keep(name):
        def hook(module, args):
            x = args[0][mask].numpy()
            found[name] = x.T @ x

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(keep(f"layers.{i}.down.weight"))
        layer.self_attn.o_proj.register_forward_pre_hook(keep(f"layers.{i}.o.weight"))
    with torch.no_grad():
        model(tokens)
    return found


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
    found = results(case)
    assert set(found) == set(expected)
    for name, by_the_book in expected.items():
        scale = np.abs(by_the_book).max()
        np.testing.assert_allclose(found[name], by_the_book, rtol=0, atol=GRAM_FP32 * scale, err_msg=name)
