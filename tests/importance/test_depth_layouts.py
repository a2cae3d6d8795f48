"""Depth criteria against transformers without those layers, in every layout; and what a scan costs.

Mutations tried by hand, each of which makes tests here fail: boundary states taken one layer too late; labels
shifted after the sequence was cut for context parallelism; padded columns left in the cross-entropy (TP=2, 3);
losses averaged per rank before the sum over data parallelism; a stage that runs a dropped layer again when the
block spans two stages; the tied head's weight of a last stage taken from an embedding that it lacks.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from depth_worker import COUNT, SIZES, tokenize
from pico import pico_llama
from ranks import run_ranks
from tolerances import DEPTH_ERROR_FP32, DEPTH_LOSS_FP32

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "depth_worker.py"
L, V = 6, 509
NOTHING = (0, -1)
MODELS = {
    "three": lambda folder: pico_llama(folder, num_attention_heads=6, num_key_value_heads=3),
    "four": lambda folder: pico_llama(folder, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True),
}
LAYOUTS = {  # world size -> layouts; a new layout is one entry
    1: [("three", {}), ("four", {})],
    2: [
        ("four", {"tp": 2}),
        ("four", {"tp": 2, "sp": True}),
        ("four", {"pp": 2}),
        ("three", {"pp": 2}),
        ("three", {"pp": 2, "first_stage": 1}),
        ("three", {"pp": 2, "vp": 3}),
        ("three", {"dp": 2}),
        ("three", {"cp": 2}),
    ],
    3: [("three", {"tp": 3}), ("three", {"tp": 3, "sp": True}), ("three", {"pp": 3})],
    4: [("four", {"tp": 2, "pp": 2, "sp": True}), ("four", {"tp": 2, "cp": 2, "sp": True})],
}
CASES = [
    {"name": model + "".join(f"-{k}{v}" for k, v in layout.items()), "model": model, "layout": layout, "world": world}
    for world, layouts in LAYOUTS.items()
    for model, layout in layouts
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models, 8 rows of 23 tokens (which neither SP nor CP divides), masks of unlike lengths, 16 questions."""
    folder = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        make(folder / name)
    random = np.random.default_rng(5)
    np.save(folder / "tokens.npy", random.integers(0, V, (8, 23)))
    mask = np.arange(23) < np.array([22, 3, 17, 2, 23, 5, 20, 9])[:, None]
    mask[4, :7] = False
    np.save(folder / "mask.npy", mask)
    words = ["tree", "be", "seed", "each", "ale", "three", "is", "eel"]
    with open(folder / "items.jsonl", "w") as file:
        for i in range(16):
            choices = [" ".join(random.choice(words, random.integers(1, 4))) for _ in range(2 + i % 3)]
            item = {"context": " ".join(random.choice(words, i % 5)), "choices": choices, "answer": i % len(choices)}
            file.write(json.dumps(item) + "\n")
    return folder


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """Case -> its result; one torchrun for all layouts of a world size."""
    done = {}

    def of(case):
        world = case["world"]
        if world not in done:
            out = tmp_path_factory.mktemp(f"world{world}")
            cases = json.dumps([case for case in CASES if case["world"] == world])
            run_ranks(world, WORKER, models, cases, out)
            done[world] = out
        return json.loads((done[world] / f"{case['name']}.json").read_text())

    return of


class Naive:
    """transformers' model with layers deleted, one whole forward pass for each number."""

    def __init__(self, folder, name):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        self.layers = list(self.model.model.layers)
        self.tokens, self.mask = (torch.from_numpy(np.load(folder / f"{n}.npy")) for n in ("tokens", "mask"))
        self.items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]

    @torch.no_grad()
    def logits(self, tokens, dropped):
        self.model.model.layers = torch.nn.ModuleList(m for i, m in enumerate(self.layers) if i not in dropped)
        return self.model(tokens, use_cache=False).logits.double()

    def loss(self, dropped):
        logits, mask = self.logits(self.tokens, dropped)[:, :-1], self.mask[:, :-1]
        return torch.nn.functional.cross_entropy(logits[mask], self.tokens[:, 1:][mask]).item()

    def error(self, reference, dropped):
        mask = self.mask.clone()
        mask[:, -1] = False
        a, b = (self.logits(self.tokens, d)[mask] for d in (reference, dropped))
        return ((a - b).square().sum() / a.square().sum()).item()

    @functools.cache  # noqa: B019
    def removal(self, against):
        gone, errors = [], []
        for _ in range(COUNT):
            reference = [] if against == "source" else gone
            found = {i: self.error(reference, [*gone, i]) for i in range(L) if i not in gone}
            gone = [*gone, min(found, key=found.get)]
            errors.append(found)
        return gone, errors

    def accuracy(self, dropped, by_length):
        right = 0
        for item in self.items:
            scores = [self.likelihood(item["context"], choice, dropped) for choice in item["choices"]]
            if by_length:
                scores = [s / len(c) for s, c in zip(scores, item["choices"], strict=True)]
            right += int(np.argmax(scores)) == item["answer"]
        return right / len(self.items)

    @functools.cache  # noqa: B019
    def likelihood(self, context, choice, dropped):
        tokens, start = tokenize(context + choice), len(tokenize(context))
        if tokens[:start] != tokenize(context):
            start -= 1  # the context's last letter and the choice's first are one token
        log_p = self.logits(torch.tensor([tokens]), dropped)[0].log_softmax(-1)
        return sum(log_p[i - 1, tokens[i]].item() for i in range(max(start, 1), len(tokens)))


@pytest.fixture(scope="module")
def naive(models):
    return {name: Naive(models, name) for name in MODELS}


@pytest.fixture(scope="module")
def expected(naive):
    """(model, criterion) -> {block: value} of the naive scan, made once."""
    made = {}

    def of(name, criterion):
        if (name, criterion) not in made:
            sizes = SIZES if criterion == "loss" else (1, 2)
            blocks = [NOTHING, *sorted((i, i + n - 1) for n in sizes for i in range(L - n + 1))]
            dropped = {block: range(block[0], block[1] + 1) for block in blocks}
            value = naive[name].loss
            if criterion != "loss":
                value = lambda layers: naive[name].accuracy(layers, criterion == "by_length")  # noqa: E731
            made[name, criterion] = {block: value(layers) for block, layers in dropped.items()}
        return made[name, criterion]

    return of


def blocks(rows):
    return {(first, last): value for first, last, value in rows}


@each_case
def test_losses_equal_a_naive_scan(case, results, expected):
    result, wanted = results(case), expected(case["model"], "loss")
    assert list(blocks(result["loss"])) == list(wanted)  # the baseline first, then sorted
    for block, loss in blocks(result["loss"]).items():
        assert loss == pytest.approx(wanted[block], rel=DEPTH_LOSS_FP32), block
    singles = [block for block in wanted if block[0] == block[1] or block == NOTHING]
    assert list(blocks(result["perplexity"])) == singles
    for block, value in blocks(result["perplexity"]).items():
        assert value == pytest.approx(np.exp(wanted[block]), rel=10 * DEPTH_LOSS_FP32), block


@each_case
@pytest.mark.parametrize("against", ["source", "round"])
def test_removal_equals_a_naive_one(case, against, results, naive):
    result = results(case)[against]
    order, rounds = naive[case["model"]].removal(against)
    assert result["order"] == order
    for found, wanted in zip(result["rounds"], rounds, strict=True):
        assert found.keys() == {str(layer) for layer in wanted}
        for layer, error in wanted.items():
            assert found[str(layer)] == pytest.approx(error, rel=DEPTH_ERROR_FP32), layer
    assert result["errors"] == [result["rounds"][i][str(layer)] for i, layer in enumerate(order)]
    assert result["depth"] == [[layer, layer, error] for layer, error in zip(order, result["errors"], strict=True)]


@each_case
@pytest.mark.parametrize("criterion", ["choices", "by_length"])
def test_accuracy_equals_a_naive_one(case, criterion, results, expected):
    assert blocks(results(case)[criterion]) == expected(case["model"], criterion)


@each_case
def test_ranks_agree_and_the_model_is_as_before(case, results):
    result = results(case)
    assert result["agreed"]
    assert result["restored"]
    if case["world"] == 1:
        assert result["error"] == "a hook failed"  # and `restored` looked after it


def test_the_references_of_a_removal_differ(naive):
    """Else the two would not test each other; in the first round they are the same."""
    (_, source), (_, own) = (naive["three"].removal(against) for against in ("source", "round"))
    assert source[0] == own[0]
    assert source[1] != own[1]


def test_layer_forwards_are_the_fewest_possible(results):
    """(L + 1) L / 2 layers and L + 1 heads for singles: the naive scan runs L (L - 1) + L layers."""
    counts = results(CASES[0])["counts"]
    assert counts["singles"] == [(L + 1) * L // 2, L + 1]
    variants = {n: L - n + 1 for n in SIZES}
    layers = L + sum((L - n) * (L - n + 1) // 2 for n in SIZES)  # one undropped pass serves all sizes
    assert counts["sizes"] == [layers, 1 + sum(variants.values())]
    rounds = [(n + 1) * n // 2 for n in (L, L - 1)]
    assert counts["round"] == [sum(rounds), 2 * L + 1]
