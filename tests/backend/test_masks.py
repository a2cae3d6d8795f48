"""What a batch's attention mask may say: padding behind a sample is none of Megatron's business, padding in front of
it is refused, since a causal model takes it for text.
"""

import numpy as np
import pytest
from pico import pico_llama, pico_nemotron_h
from tolerances import LOGITS_PICO_FP32

from nemo_minitron.errors import InputError
from nemo_minitron.hosts import chosen

ON_NEMO = chosen()[0] == "nemo"
LEFT = r"attention_mask hides the start of a row, as padding on the left does; .*: pad on the right, or join samples"
FRONT, LENGTH = 3, 12  # padding in front of the second row


def forbidden(seen):
    """Megatron's form, [B, 1, S, P], of which keys [B, P] of the past a query sees."""
    import torch

    past = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return ~(past & (seen > 0)[:, None, None, :])


def masks():
    import torch

    right, left = torch.ones(2, LENGTH, dtype=torch.long), torch.ones(2, LENGTH, dtype=torch.long)
    right[1, -FRONT:], left[1, :FRONT] = 0, 0
    return right, left


def test_padding_on_the_right_needs_no_mask():
    import torch

    from nemo_minitron.backend.masks import given_mask

    right, _ = masks()
    causal, behind = forbidden(torch.ones(2, LENGTH)), forbidden(right)
    assert given_mask(right) is None
    assert given_mask(right.bool()) is None
    for mask in (None, causal, behind, causal.float(), torch.ones(LENGTH, dtype=torch.long)):
        assert given_mask(mask) is mask


def test_padding_on_the_left_and_samples_side_by_side_are_refused():
    import torch

    from nemo_minitron.backend.masks import given_mask

    _, left = masks()
    documents = forbidden(torch.ones(2, LENGTH))
    documents[0, 0, FRONT:, :FRONT] = True
    for mask in (left, left.bool(), left.float(), forbidden(left), forbidden(left).float(), documents):
        with pytest.raises(InputError, match=LEFT):
            given_mask(mask)


@pytest.fixture(scope="module")
def llama(one_process, tmp_path_factory):
    """Its folder and its live model on the host that is installed here."""
    return live(pico_llama(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=2))


def live(folder):
    from workers import load_model

    import nemo_minitron.backend as backend

    backend.setup()
    (model,) = load_model(folder)
    return folder, model.eval()


def logits_of(model, tokens):
    import torch

    with torch.no_grad():
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model(input_ids=tokens, position_ids=places, attention_mask=None)[..., :509]


def differences(folder, model):
    """How far Megatron's logits of the real tokens of a row are from transformers' of that row alone, if the padding
    stands behind the row, and if it stands in front of it."""
    import torch
    from transformers import AutoModelForCausalLM

    row = torch.from_numpy(np.random.default_rng(7).integers(3, 509, (1, LENGTH - FRONT)))
    padding = torch.zeros(1, FRONT, dtype=torch.long)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(row).logits
    behind = logits_of(model, torch.cat([row, padding], 1))[:, : LENGTH - FRONT]
    before = logits_of(model, torch.cat([padding, row], 1))[:, FRONT:]
    assert expected.std() > 0.1
    return [float((found - expected).abs().max()) for found in (behind, before)]


def test_megatron_takes_padding_on_the_left_for_text(llama):
    behind, before = differences(*llama)
    assert behind < LOGITS_PICO_FP32
    assert before > 1000 * LOGITS_PICO_FP32


@pytest.mark.bridge
def test_a_mamba_state_runs_through_padding_on_the_left(one_process, tmp_path):
    behind, before = differences(*live(pico_nemotron_h(tmp_path / "hybrid", vocab_size=509)))
    assert behind < LOGITS_PICO_FP32
    assert before > 1000 * LOGITS_PICO_FP32


def test_scores_of_a_padded_batch(llama):
    """Positions that transformers' mask has as padding do not count; in front of a row they are refused."""
    import torch

    from nemo_minitron.importance import estimate
    from nemo_minitron.importance.samples import samples_of

    right, left = masks()
    tokens = torch.from_numpy(np.random.default_rng(3).integers(3, 509, (2, LENGTH)))
    batches = [{"tokens": tokens, "loss_mask": right.float()}, {"tokens": tokens, "attention_mask": right}, tokens]
    wanted, found, unmasked = (estimate(llama[1], [batch]).tensors for batch in batches)
    for name in wanted:
        assert np.array_equal(wanted[name], found[name]), name
    assert not np.array_equal(wanted["ffn"], unmasked["ffn"])
    with pytest.raises(InputError, match=LEFT):
        estimate(llama[1], [{"tokens": tokens, "attention_mask": left}])
    with pytest.raises(InputError, match=LEFT):  # what a callback sees of a running evaluation
        samples_of({"tokens": tokens, "attention_mask": forbidden(left)})
    assert samples_of({"tokens": tokens, "attention_mask": forbidden(right)}).present == 2


def test_a_distillation_is_given_no_mask_for_padding_on_the_right_and_refuses_the_other():
    import torch

    import nemo_minitron.backend as backend

    backend.setup()
    if ON_NEMO:
        from nemo_minitron.hosts.nemo.distill import model_inputs
    else:
        from nemo_minitron.hosts.bridge.load import load_training

        load_training()
        from nemo_minitron.hosts.bridge.distill import model_inputs
    right, left = masks()
    batch = {"tokens": torch.zeros(2, LENGTH), "position_ids": torch.zeros(2, LENGTH)}
    assert model_inputs(batch | {"attention_mask": right})["attention_mask"] is None
    for mask in (left, forbidden(left)):
        with pytest.raises(InputError, match=LEFT):
            model_inputs(batch | {"attention_mask": mask})
