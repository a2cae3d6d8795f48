"""The host's models in FP8, emulated: what of scores, plans, logits and gradients it changes, and what it does not.

One process. FP8 depends on the layout by nature (a scale is that of a rank's shard), so no layout is compared here.
"""

import numpy as np
import pytest
import torch
from pico import pico_llama
from scipy.stats import spearmanr
from tolerances import FP8_GRADIENT, FP8_KL, FP8_OVERLAP, FP8_SCORES
from workers import load_model

import nemo_minitron.backend as backend
from nemo_minitron.errors import InputError
from nemo_minitron.precisions import FP8

SIZES = {
    "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Precision -> (Scores, logits, gradients of all parameters) of one pico model, on the same rows."""
    backend.setup()
    from nemo_minitron.importance import estimate

    folder = pico_llama(tmp_path_factory.mktemp("fp8") / "teacher", **SIZES)
    tokens = torch.randint(509, (4, 32), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(32)[None].expand_as(tokens)
    results = {}
    for name in ("bf16", *FP8):
        model = load_model(folder, precision=name)[0]
        scores = estimate(model, list(tokens.split(2)))
        logits = model(tokens, positions, None)
        logits.float().logsumexp(-1).mean().backward()
        gradients = {key: parameter.grad.float() for key, parameter in model.named_parameters()}
        results[name] = scores, logits.detach().float(), gradients
    return results


@pytest.mark.parametrize("name", list(FP8))
def test_scores_and_plans(found, name):
    """A real model's figures: benchmarks/fp8_emulation.py."""
    from nemo_minitron.search import plan

    ours, theirs = found[name][0], found["bf16"][0]
    for axis in ("ffn", "hidden", "heads"):
        a, b = np.atleast_2d(ours[axis]), np.atleast_2d(theirs[axis])
        assert not np.array_equal(a, b)  # it does do something
        assert (np.abs(a - b) / b.max(axis=-1, keepdims=True)).max() < FP8_SCORES
    kept = [plan(scores, keep={"ffn": 128}).keep["ffn"] for scores in (ours, theirs)]
    overlap = np.mean([len({*kept[0][layer]} & {*kept[1][layer]}) / 128 for layer in range(6)])
    rank = np.mean([spearmanr(x, y).statistic for x, y in zip(ours["ffn"], theirs["ffn"], strict=True)])
    assert 1 - FP8_OVERLAP < overlap <= 1
    assert 1 - FP8_OVERLAP < rank < 1


@pytest.mark.parametrize("name", list(FP8))
def test_logits_and_gradients(found, name):
    _, logits, gradients = found[name]
    _, wide, wanted = found["bf16"]
    kl = torch.nn.functional.kl_div(logits.log_softmax(-1), wide.log_softmax(-1), reduction="none", log_target=True)
    assert 0 < kl.sum(-1).mean() < FP8_KL
    for key, gradient in gradients.items():
        difference = (gradient - wanted[key]).norm() / wanted[key].norm()
        assert 0 < difference < FP8_GRADIENT, key


def test_recipes_differ(found):
    logits = [found[name][1] for name in FP8]
    assert not torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[1], logits[2])


def test_sizes_and_names_are_refused(tmp_path):
    folder = pico_llama(tmp_path / "odd", num_hidden_layers=1)
    with pytest.raises(InputError, match=r"query_groups=3 is not legal in fp8-current.*the nearest legal size is 4"):
        load_model(folder, precision="fp8-current")
    with pytest.raises(InputError, match="precision 'fp9' is unknown here"):
        load_model(folder, precision="fp9")
