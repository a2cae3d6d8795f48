"""What a wrong training would show at once, on whichever host is installed: a student that is its teacher has nothing
to learn, and one batch, seen again and again, is learned by heart.

Such a training costs two starts of the host, so a job's own gates leave it out (docs/options.md).
"""

import csv

import numpy as np
import pytest
from command_line import TEXTS, minitron
from corpora import write_indexed
from pico import pico_llama
from tolerances import ITSELF_KL
from words import save_tokenizer

from nemo_minitron.families import from_hf
from nemo_minitron.pruning import prune
from nemo_minitron.search import random_plan

pytestmark = pytest.mark.slow
LENGTH, ROWS = 32, 4
SETTINGS = ("--sequence-length", LENGTH, "--global-batch-size", ROWS, "--precision", "fp32", "--data", "batch")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher, a student with half of its neurons, and a text of one batch. Its rows begin a token earlier in each
    step, so it repeats a single token: every step sees the same batch."""
    folder = tmp_path_factory.mktemp("gates")
    save_tokenizer(pico_llama(folder / "teacher", vocab_size=509), TEXTS, 509)
    plan = random_plan(from_hf(folder / "teacher"), keep={"ffn": 48})
    prune(folder / "teacher", plan, folder / "student")
    write_indexed(folder / "batch", np.full((1, LENGTH * ROWS + 1), 77))  # one more: the last label
    return folder


def losses(models, student, steps, *settings):
    out = f"{student}-out"
    tokens = ("--tokens", LENGTH * ROWS * steps, "--out", out)
    minitron(models, "distill", student, "--teacher", "teacher", *SETTINGS, *tokens, *settings)
    return [float(row["loss"]) for row in csv.DictReader((models / out / "loss.csv").open())]


def test_a_student_that_is_its_teacher_has_nothing_to_learn(models):
    """The KL is rounding, and stays so small after steps of Adam, which make steps of any gradient, however small."""
    found = losses(models, "teacher", 4, "--learning-rate", 1e-6, "--warmup-steps", 1)
    print(found)
    assert len(found) == 4
    assert max(map(abs, found)) < ITSELF_KL


def test_one_batch_is_learned_by_heart(models):
    found = losses(models, "student", 40, "--learning-rate", 1e-3, "--warmup-steps", 5)
    print(found)
    assert found[0] > 1e-3
    assert found[-1] < found[0] / 2
