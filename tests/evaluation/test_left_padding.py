"""Prompts of unlike lengths in one batch, padded on the left with a mask, as lm-eval generates: in the models that
`evaluate` loads, each has the logits that it has alone, for every kind of position and attention.

Tried by hand: a hybrid whose cache counts its tokens as transformers does (0.12 off from the second new token on).
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from tolerances import LOGITS_PICO_FP32

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))

import contract
from pico import pico_nemotron_h

NEW, LENGTHS = 4, (5, 12, 9)
# rotary positions; none in some layers; windows; caps; YaRN with sinks; latents with and without a softmax of their own
NAMES = ["llama-own", "smollm3-own", "mistral-own", "gemma2-own", "gemma3_text-own", "gpt_oss-own"]
NAMES += ["deepseek_v2-own", "deepseek_v3-own", "nemotron-other", "phi3-own"]


def generated(model, rows):
    """The ids and the logits of the new tokens, [rows, new] and [rows, new, vocabulary]."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    how = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, **how)
    return out.sequences[:, longest:].numpy(), torch.stack(out.logits, 1).numpy()


def check(folder):
    from nemo_minitron.evaluation.model import load

    model, random = load(folder, "fp32"), np.random.default_rng(2)
    rows = [random.integers(3, 509, length).tolist() for length in LENGTHS]
    ids, logits = generated(model, rows)
    for row, found, numbers in zip(rows, ids, logits, strict=True):
        (alone,), (expected,) = generated(model, [row])
        assert expected.std() > 0.1
        assert np.array_equal(found, alone)
        assert np.abs(numbers - expected).max() < LOGITS_PICO_FP32


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_prompt_has_its_own_logits(name, tmp_path):
    check(contract.make(tmp_path / "t", name))


@pytest.mark.bridge
def test_a_hybrids_states_do_not_run_through_padding(tmp_path):
    check(pico_nemotron_h(tmp_path / "t", vocab_size=509))
