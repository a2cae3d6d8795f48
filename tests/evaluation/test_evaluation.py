"""Numbers of a Hugging Face folder, against float64 and by hand."""

import json
import math

import numpy as np
import pytest
from words import VOCAB, WORDS

from nemo_minitron.errors import InputError
from nemo_minitron.evaluation import Numbers, evaluate, generate, perplexity
from nemo_minitron.evaluation.generation import sample
from nemo_minitron.families import from_hf

FP32_LOSS = 2e-5  # relative, fp32 forward of two layers against float64; measured 1e-7 to 1e-6
BF16_LOSS = 0.05  # relative, bf16 forward with large weights against float64; measured 0.005


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(1).integers(0, VOCAB, (5, 23))


def reference(folder, windows):
    """Mean next-token cross entropy, all in float64, one position at a time."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder).double()
    with torch.no_grad():
        logits = model(torch.from_numpy(windows)).logits.numpy()
    nats = []
    for row, window in zip(logits, windows, strict=True):
        for position in range(len(window) - 1):
            scores = row[position] - row[position].max()
            nats.append(math.log(np.exp(scores).sum()) - scores[window[position + 1]])
    return math.fsum(nats) / len(nats)


def test_loss_equals_float64(folder, windows, monkeypatch):
    monkeypatch.setattr(perplexity, "POSITIONS", 7)  # 22 predictions: three whole chunks and a rest
    expected = reference(folder, windows)
    numbers = evaluate(folder, windows, precision="fp32", corpus="noise", stage="teacher")
    assert abs(expected - math.log(VOCAB)) > 0.5  # else a wrong shift would not show
    assert numbers.loss == pytest.approx(expected, rel=FP32_LOSS)
    assert numbers.perplexity == pytest.approx(math.exp(expected), rel=10 * FP32_LOSS)
    assert evaluate(folder, windows).loss == pytest.approx(expected, rel=BF16_LOSS)


def test_numbers_have_exactly_the_keys_of_the_file(folder, windows):
    values = evaluate(folder, windows, precision="fp32", corpus="noise", stage="teacher").as_dict()
    assert list(values) == [
        "stage", "corpus", "tokens", "parameters", "loss", "perplexity", "bits_per_byte", "seconds",
        "loss_error",
    ]  # fmt: skip
    assert (values["stage"], values["corpus"], values["bits_per_byte"]) == ("teacher", "noise", None)
    assert values["tokens"] == 5 * 22
    assert values["parameters"] == from_hf(folder).parameters()
    assert values["seconds"] > 0


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batch_size_changes_nothing(folder, windows, batch_size):
    done = []
    numbers = evaluate(
        folder, windows, precision="fp32", batch_size=batch_size, progress=lambda *state: done.append(state)
    )
    assert numbers.loss == pytest.approx(evaluate(folder, windows, precision="fp32", batch_size=5).loss, rel=1e-6)
    assert done[-1] == (5, 5)
    assert len(done) == math.ceil(5 / batch_size)


def test_bits_per_byte_by_hand(folder, windows):
    token_bytes = np.arange(VOCAB)
    numbers = evaluate(folder, windows, token_bytes=token_bytes, precision="fp32")
    text = windows[:, 1:].sum()  # a token's id is its length here; the first of a window is not predicted
    assert numbers.bits_per_byte == pytest.approx(numbers.loss * 110 / math.log(2) / text)
    assert Numbers.from_totals(
        nats=8 * math.log(2), tokens=4, text_bytes=16, corpus="", parameters=1, seconds=0.0
    ).bits_per_byte == pytest.approx(0.5)


def test_a_hopeless_loss_stays_a_number():
    numbers = Numbers.from_totals(1e6, 1, corpus="", parameters=1, seconds=0.0)
    assert json.loads(json.dumps(numbers.as_dict(), allow_nan=False))["loss"] == 1e6


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (np.zeros(8, int), "windows"),
        (np.zeros((2, 1), int), "at least 2 tokens"),
        (np.zeros((0, 8), int), "at least one window"),
        (np.zeros((2, 8)), "float64"),
        (np.full((1, 8), VOCAB), f"token {VOCAB} is outside"),
        (np.full((1, 8), -1), "token -1 is outside"),
    ],
)
def test_windows_that_do_not_fit_are_refused(folder, bad, says):
    with pytest.raises(InputError, match=says):
        evaluate(folder, bad)


def test_other_refusals(folder, windows, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        evaluate(tmp_path / "nothing", windows)
    with pytest.raises(InputError, match="bf16"):
        evaluate(folder, windows, precision="bf17")
    with pytest.raises(InputError, match="batch_size"):
        evaluate(folder, windows, batch_size=0)
    with pytest.raises(InputError, match="token_bytes"):
        evaluate(folder, windows, token_bytes=np.ones(3, int))


def damaged(folder, target, change):
    """A copy of the folder whose tensors went through `change`."""
    import shutil

    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, target)
    tensors = change(load_file(target / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_missing_weight_is_an_error(folder, windows, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    path = damaged(folder, tmp_path / "a", lambda tensors: {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(InputError, match=f"missing weights, such as '{name}'"):
        evaluate(path, windows)


def test_a_weight_of_another_shape_is_an_error(folder, windows, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    path = damaged(folder, tmp_path / "a", lambda tensors: tensors | {name: tensors[name][:-1].copy()})
    with pytest.raises(InputError, match="cannot load"):
        evaluate(path, windows)


def test_weights_that_are_not_finite_are_an_error(folder, windows, tmp_path):
    path = damaged(folder, tmp_path / "a", lambda tensors: {k: v * np.float32("nan") for k, v in tensors.items()})
    with pytest.raises(InputError, match="not finite"):
        evaluate(path, windows)


def greedy(folder, ids, steps):
    """Greedy decoding without a cache."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    for _ in range(steps):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


def test_generate_is_greedy_and_leaves_sampling_settings_aside(folder):
    path = folder / "generation_config.json"
    before = path.read_text()
    path.write_text(json.dumps({"do_sample": True, "temperature": 5.0}))
    try:
        texts = generate(folder, ["w4 w9", "w7"], max_new_tokens=6, precision="fp32")
    finally:
        path.write_text(before)
    expected = [greedy(folder, [5, 10], 6)[2:], greedy(folder, [8], 6)[1:]]
    assert texts == ["".join(WORDS[token] for token in new if token) for new in expected]


def test_generate_refuses_an_empty_prompt_and_a_folder_without_tokenizer(folder, tmp_path):
    with pytest.raises(InputError, match="no token"):
        generate(folder, ["w4", ""])
    with pytest.raises(InputError, match="does not exist"):
        generate(tmp_path / "nothing", ["w4"])
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InputError, match="no tokenizer"):
        generate(tmp_path, ["w4"])


def drawn(folder, prompts, **options):
    batches = sample(folder, prompts, max_new_tokens=5, batch_size=2, precision="fp32", seed=7, **options)
    return {first: [(row.prompt, row.continuation) for row in rows] for first, rows in batches}


def test_sample_is_settled_by_its_seed_and_skips_without_a_trace(folder):
    """Of seven prompts the first four and the last three are of one length: batches begin at 0, 2, 4 and 6."""
    prompts = [[5, 10], [8, 9], [5, 10], [8, 9], [4, 6, 7], [5, 5, 5], [9, 8, 7]]
    whole = drawn(folder, prompts)
    assert [(first, len(rows)) for first, rows in whole.items()] == [(0, 2), (2, 2), (4, 2), (6, 1)]
    assert whole[0][0][0] == WORDS[5] + WORDS[10]
    assert whole[0] != whole[2]  # the same prompts, drawn anew
    assert drawn(folder, prompts) == whole
    assert drawn(folder, prompts, skip=lambda first: first in (0, 4)) == {2: whole[2], 6: whole[6]}
    # So cold a distribution has its likeliest token alone, as greedy generation has it.
    cold = drawn(folder, prompts[:1], temperature=1e-4)[0][0][1]
    assert cold == "".join(WORDS[token] for token in greedy(folder, [5, 10], 5)[2:] if token)
    assert drawn(folder, prompts[:1], temperature=50.0, top_p=1e-6)[0][0][1] == cold
    assert drawn(folder, prompts[:1], temperature=50.0)[0][0][1] != cold
    with pytest.raises(InputError, match="prompt 2 of 2 has no token"):
        drawn(folder, [[5], []])
