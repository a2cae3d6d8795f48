"""What the dry run says of the papers' practices, and the GPU-hours by hand."""

import dataclasses
import json

import pytest
from pico import SIZES
from test_architecture import of_table

from nemo_minitron.job import Data, Distillation, Job, Search
from nemo_minitron.job.compute import candidate_steps, compute
from nemo_minitron.job.dry_run import describe
from nemo_minitron.job.practices import Facts, facts_of, practices

LLAMA = of_table("llama-3.1-8b")
WIDTH = Facts(LLAMA, of_table("llama-3.1-minitron-4b-width"), correction_tokens=1000)
DEPTH = dataclasses.replace(WIDTH, target=of_table("llama-3.1-minitron-4b-depth"), intermediate=True)
NEMOTRON = dataclasses.replace(WIDTH, source=of_table("nemotron-4-15b"), target=of_table("minitron-8b"))
CASES = [
    (WIDTH, 0, "only widths, of a source of 8.03B: below 15B a narrower model"),
    (NEMOTRON, 0, "only widths, of a source of 15.6B: a narrower"),
    (DEPTH, 0, "16 of 32 layers are dropped, of a source of 8.03B, and no width is cut: faster, but below 15B"),
    (dataclasses.replace(NEMOTRON, target=NEMOTRON.source.replace(num_layers=16)), 0, "no width is cut: the fastest"),
    (
        dataclasses.replace(WIDTH, target=WIDTH.target.replace(num_layers=28)),
        0,
        "4 of 32 layers are dropped and widths cut",
    ),
    (WIDTH, 1, "once, before the cut"),
    (dataclasses.replace(WIDTH, rounds=3), 1, "in 3 rounds: one is enough"),
    (WIDTH, 2, "KL on logits alone: no layers are dropped"),
    (
        dataclasses.replace(WIDTH, target=LLAMA.replace(num_layers=28)),
        2,
        "alone: 12% of the layers are dropped, a cut so mild",
    ),
    (
        dataclasses.replace(DEPTH, intermediate=False),
        2,
        "alone: 50% of the layers are dropped, .*intermediate=auto would help",
    ),
    (DEPTH, 2, "states and embeddings: 50% of the layers are dropped, a cut so deep"),
    (dataclasses.replace(WIDTH, intermediate=True), 2, "logits alone do as well for a cut so mild"),
    (dataclasses.replace(WIDTH, lm_loss=True), 2, "with the LM loss, which the papers leave out"),
    (dataclasses.replace(WIDTH, logits=False), 2, "the language-model loss alone"),
    (WIDTH, 3, "keeps 56% of it: cut the smallest model that is larger"),
    (
        dataclasses.replace(NEMOTRON, target=of_table("minitron-4b")),
        3,
        "keeps 27% of it: cut a model between the two first",
    ),
    (WIDTH, 4, "on 1,000 tokens, since the data is not the teacher's own"),
    (dataclasses.replace(WIDTH, correction_tokens=0), 4, "off, but the data is not the teacher's own"),
    (dataclasses.replace(WIDTH, correction_tokens=0, own_data=True), 4, "not needed on the teacher's own data"),
    (dataclasses.replace(WIDTH, own_data=True), 4, "not needed .*, but 1,000 tokens are spent"),
]


@pytest.mark.parametrize(("facts", "line", "words"), CASES)
def test_each_practice_says_what_the_recipe_does(facts, line, words):
    import re

    found = practices(facts)
    assert len(found) == 5
    assert re.search(words, found[line]), found[line]
    assert all("\n" not in text and len(text) < 140 for text in found)


def test_the_facts_are_the_recipes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **SIZES}))
    settings = Distillation(lm_weight=0.5, intermediate="auto", correction_tokens=7000)
    job = Job("pico", str(tmp_path), Data("a", "b", teachers_own=True), keep={"layers": 3}, distillation=settings)
    facts = facts_of(job, LLAMA, WIDTH.target)
    assert facts == Facts(LLAMA, WIDTH.target, True, True, True, 7000, True, 1)
    text = describe(job)
    assert "  axes: 3 of 6 layers are dropped" in text
    assert "  teacher correction: not needed on the teacher's own data, but 7,000 tokens are spent" in text


def test_gpu_hours_by_hand():
    """Three passes' worth for what is trained, one for the teacher; attention looks back half a sequence."""
    settings = Distillation(tokens=20_000, sequence_length=1000, global_batch_size=4)
    ours, theirs = WIDTH.target.flops_per_token(500), LLAMA.flops_per_token(500)
    cost = compute(WIDTH.target, LLAMA, settings)
    assert (cost.student, cost.teacher, cost.correction) == (3 * ours * 20_000, theirs * 20_000, 0)
    assert cost.gpu_hours == (3 * ours + theirs) * 20_000 / (989e12 * 0.4) / 3600
    corrected = compute(WIDTH.target, LLAMA, dataclasses.replace(settings, correction_tokens=9000))
    assert corrected.correction == 3 * theirs * 8000  # whole steps
    lm_alone = dataclasses.replace(settings, logits_weight=0.0, lm_weight=1.0)
    assert compute(WIDTH.target, LLAMA, lm_alone).teacher == 0
    search = Search(params="4.5B", candidates=9, distil=5, steps=60, rounds=3)
    assert candidate_steps(search) == 20 * (5 + 3 + 2)
    assert compute(WIDTH.target, LLAMA, settings, search).search == (3 * ours + theirs) * 200 * 4000
    assert compute(WIDTH.target, LLAMA, settings, Search()).total == cost.total


def test_the_correction_has_its_own_warm_up():
    settings = Distillation(warmup_tokens=9, warmup_steps=5, correction_tokens=1)
    assert settings.correction().warmup_tokens == 9
    own = dataclasses.replace(settings, correction_warmup_steps=120).correction()
    assert (own.warmup, own.learning_rate) == (120, 2e-5)
