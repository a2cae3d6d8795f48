"""`minitron cache-logits`: a killed run resumes and ends with the same bits, and bad input is refused before a process
starts."""

import csv
import json
import os
import shutil
import signal
import time

import command_line
import numpy as np
import pytest
from pico import pico_gpt_oss, pico_llama
from words import save_tokenizer

from nemo_minitron.artifacts.cache_settings import CacheSettings
from nemo_minitron.artifacts.logit_cache import HEADER, CacheHeader, LogitCache
from nemo_minitron.artifacts.temporary import BESIDE
from nemo_minitron.commands.cache import check_cache, run_cache, teacher_digest
from nemo_minitron.commands.corpus import tokenise
from nemo_minitron.commands.distill import run_distill
from nemo_minitron.errors import InputError
from nemo_minitron.job import Distillation, Layout
from nemo_minitron.pruning import HFSource

TEXTS = [f"the model number {i} reads {i * 7} words and the next {'word ' * (i % 9)}ends." for i in range(120)]
LENGTH = 16
OPTIONS = ["--sequence-length", LENGTH, "--draws", 30, "--precision", "fp32", "--rows-per-shard", 2]


def start(folder, *arguments, command="cache-logits"):
    return command_line.start(folder, command, *arguments)


def finish(process):
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, another one with another rotary base, two texts, and a cache that the command made of the first
    teacher."""
    folder = tmp_path_factory.mktemp("cache")
    pico_llama(folder / "teacher", vocab_size=512)
    save_tokenizer(folder / "teacher", TEXTS, 512)
    shutil.copytree(folder / "teacher", folder / "other")
    config = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps(config | {"rope_theta": 10_000.0}))
    for name, texts in {"corpus": TEXTS, "novel": TEXTS[::-1], "short": TEXTS[:1]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    finish(start(folder, "teacher", "--data", "corpus.jsonl", "--out", "whole", *OPTIONS))
    return folder


def shards(folder):
    return {file.name: file.read_bytes() for file in folder.glob("shard-*")}


@pytest.mark.slow
def test_a_killed_cache_goes_on_and_ends_with_the_same_bytes(world):
    arguments = ["teacher", "--data", "corpus.jsonl", "--out", "killed", *OPTIONS]
    process, out = start(world, *arguments), world / "killed"
    while process.poll() is None and len(list(out.glob("shard-*"))) < 3:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    (out / "shard-00000.logits").unlink()  # so that one is missing, wherever the kill came
    half = out / f".shard-00009.logits{BESIDE}abcd1234"  # as a kill leaves what it was writing
    half.mkdir()
    (half / "shard-00009.logits").write_bytes(b"half")
    made = {file: file.stat().st_mtime_ns for file in out.glob("shard-*")}
    assert "bytes a token" in finish(start(world, *arguments))
    assert {file: file.stat().st_mtime_ns for file in made} == made
    assert shards(out) == shards(world / "whole")
    assert {file.name for file in out.iterdir()} == {HEADER, *shards(out)}


def corpus(world):
    """The tokens of the text, as the command makes them in a folder that it removes."""
    return tokenise(str(world / "corpus.jsonl"), world / "teacher", world / "tokens" / "train", 512)


@pytest.mark.slow
def test_the_cache_holds_every_row_of_the_text(world):
    cache, tokens = LogitCache(world / "whole"), corpus(world)
    rows = (tokens.tokens - 1) // LENGTH
    assert cache.header.rows == rows
    for row in range(rows):
        found = cache.find(tokens.stream(row * LENGTH, LENGTH))  # another, where two rows are the same
        assert np.array_equal(tokens.stream(found * LENGTH, LENGTH), tokens.stream(row * LENGTH, LENGTH))
        kept = cache.read(row)
        assert (np.add.reduceat(kept.counts, np.cumsum(kept.lengths) - kept.lengths) == 30).all()
    check_cache(world / "whole", tokens.prefix, HFSource(world / "teacher"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "other"}, "is of another teacher"),
        ({"data": "novel.jsonl"}, "is of other text"),
        ({"samples": 3}, r"has rows \d+, not 3"),
        ({"draws": 31}, "has draws 30, not 31"),
        ({"seed": 5}, "has seed 1234, not 5"),
        ({"mode": "top-k"}, "has mode sample, not top-k"),
        ({"samples": 10**6}, r"samples is 1000000, but the corpus has \d+ rows"),
        ({"sequence_length": 10**6}, "is 1000000, but the model has 256 positions"),
        ({"data": "short.jsonl", "sequence_length": 200}, "which is less than a row of 200"),
        ({"layout": Layout(tp=2)}, "the nearest legal tp is"),
        ({"out": "teacher"}, "exists and is no logit cache"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_another_cache_in_its_place_is_refused(world, change, words, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr("nemo_minitron.commands.cache.launch", None)  # nothing is started
    names = ("draws", "seed", "mode", "sequence_length")
    given = {"draws": 30, "sequence_length": LENGTH} | {name: change[name] for name in names if name in change}
    settings, out = CacheSettings(precision="fp32", **given), world / change.get("out", "whole")
    before = shards(world / "whole")
    with pytest.raises(InputError, match=words):
        run_cache(
            change.get("model", "teacher"), change.get("data", "corpus.jsonl"), out, settings,
            change.get("layout", Layout()), samples=change.get("samples"),
        )  # fmt: skip
    assert shards(world / "whole") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "novel.jsonl"}, "is of other text"),
        ({"teacher": "other"}, "is of another teacher"),
        ({"temperature": 2.0}, r"has temperature 1\.0, not 2\.0"),
        ({"sequence_length": 8}, "has sequence_length 16, not 8"),
        ({"teacher_cache": "begun"}, r"has 0 of its \d+ shards"),
        ({"teacher_cache": "none"}, "does not exist"),
        ({"teacher_cache": ""}, "give --teacher or --teacher-cache"),
        ({"intermediate": "auto"}, "intermediate needs a teacher that runs"),
        ({"logits_weight": 0.0, "lm_weight": 1.0}, "nothing would be learned from teacher_cache"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_training_refuses_a_cache_of_something_else(world, change, words, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr("nemo_minitron.commands.distill.launch", None)  # nothing is started
    CacheHeader.load("whole").save("begun")
    places = {"data": "corpus.jsonl", "teacher": None}
    given = {"tokens": 160, "sequence_length": LENGTH, "teacher_cache": "whole"}
    given |= {name: value for name, value in change.items() if name not in places}
    data, teacher = ((places | change)[name] for name in ("data", "teacher"))
    with pytest.raises(InputError, match=words):
        run_distill("teacher", teacher, data, world / "student", Distillation(**given), Layout())
    assert not (world / "student").exists()


@pytest.mark.slow
def test_a_student_learns_from_it_by_the_command(world):
    """The student has the teacher's own weights here, so its cross-entropy is near the lowest possible one."""
    arguments = ["teacher", "--teacher-cache", "whole", "--data", "corpus.jsonl", "--out", "distilled"]
    options = ["--tokens", LENGTH * 4 * 3, "--sequence-length", LENGTH, "--global-batch-size", 4, "--precision", "fp32"]
    finish(start(world, *arguments, *options, command="distill"))
    rows = list(csv.DictReader((world / "distilled" / "loss.csv").open()))
    assert list(rows[0]) == ["step", "tokens", "loss", "seconds", "cross_entropy"]
    assert len(rows) == 3
    assert (world / "distilled" / "model.safetensors").is_file()


@pytest.mark.parametrize("config", [{"router_aux_loss_coef": 0.5}, {"rms_norm_eps": 2e-5}, {"sliding_window": 9}])
def test_a_digest_of_a_model_that_nemo_lacks(tmp_path, config):
    teacher = pico_gpt_oss(tmp_path / "a", num_hidden_layers=2)
    other = pico_gpt_oss(tmp_path / "b", num_hidden_layers=2, **config)
    assert teacher_digest(HFSource(teacher)) != teacher_digest(HFSource(other))


def test_a_teachers_digest_sees_its_config(tmp_path):
    for name, base in (("a", 5000.0), ("b", 10_000.0)):
        pico_llama(tmp_path / name, rope_theta=base)
    assert teacher_digest(HFSource(tmp_path / "a")) != teacher_digest(HFSource(tmp_path / "b"))
