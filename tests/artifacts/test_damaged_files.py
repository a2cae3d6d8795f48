"""Every reader of ours on hundreds of damaged files: a sentence, or values that the next step can use; never a raw
error, a huge allocation or a long wait."""

import csv
import json
import resource
import time

import mutations_of_files as mutations
import numpy as np
import pytest
from pico import pico_llama
from test_logit_cache import SETTINGS, made
from test_plan_file import small
from test_scores_file import scores

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Compensation, Manifest, PrunePlan, Scores, compose, records
from nemo_minitron.artifacts.files import digest_of, read_json
from nemo_minitron.artifacts.logit_cache import HEADER, LogitCache, shard_path
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.cli.find import find
from nemo_minitron.commands.finetune import check_rows
from nemo_minitron.errors import InputError
from nemo_minitron.export.card import CardFacts, card_text
from nemo_minitron.families import from_hf
from nemo_minitron.importance.depth.items import read_items
from nemo_minitron.settings.recipe import Data, Job
from nemo_minitron.sources.headers import read_header

ROW = {"stage": "teacher", "corpus": "text", "tokens": 9, "parameters": 30, "loss": 1.5, "perplexity": 4.5,
       "bits_per_byte": None, "seconds": 2.5}  # fmt: skip
STANDING = {"step": 1, "candidate": "layers4-ffn8", "loss": 2.5, "rank": 1}
CANDIDATE = {"name": "layers4-ffn8", "layers": 4, "parameters": 99, "kept": 0.5, "rank": 1, "front": True, "loss": 2.5}
FRONT = "---\nlicense: apache-2.0\ndate: 2024-01-02\ntags: [a, b]\nlicense_link: https://example.org/x\n---\n# A card\n"
SECONDS, BYTES = 5, 1 << 30  # a file; two hundred together take a second or two
COUNT = 120  # of bytes, and as many of values
ONE_IN = {"card": 3}  # of them: a card takes a while to write


def written(folder, name, values):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder / name


def of_json(values, read):
    return lambda folder: (written(folder, "file.json", values), read)


def a_plan(folder):
    small().save(folder / "plan.json")

    def read(file):
        plan = PrunePlan.load(file)
        return plan.digest, plan.as_dict(), compose(plan), plan.target.parameters()

    return folder / "plan.json", read


def some_scores(folder):
    scores().save(folder / "s.safetensors")

    def read(file):
        found = Scores.load(file)
        return found.digest, [found.under(name) for name in found.criteria], found.save(folder / "again")

    return folder / "s.safetensors", read


def a_compensation(folder):
    Compensation("ab", {"layers.0.down.weight": np.ones((3, 4), np.float32)}, {"ridge": 1.0}).save(folder / "c")
    return folder / "c", lambda file: [dict(found.tensors) for found in [Compensation.load(file)]]


def rows_of(cache):
    found = LogitCache(cache)
    return [found.read(row) for row in range(found.header.rows)]


def a_cache(folder):
    made(folder / "cache", SETTINGS["count"])
    return folder / "cache" / HEADER, lambda file: rows_of(file.parent)


def a_shard(folder):
    made(folder / "cache", SETTINGS["count"])
    return shard_path(folder / "cache", 1), lambda file: rows_of(file.parent)


def a_curve(folder):
    lines = ["step,tokens,loss,seconds", *(f"{i},{i * 128},{5 - i / 9},{i * 0.5}" for i in range(1, 20))]
    return written(folder, "loss.csv", "\n".join(lines) + "\n"), read_curve


def read_curve(file):
    return [(int(row["step"]), int(row["tokens"])) for row in records.read_curve(file, ("step", "tokens", "loss"))]


def a_recipe(folder):
    values = Job(name="a", teacher="t", data=Data("a.txt", "b.txt"), keep={"ffn": 64}, licence="mit").as_dict()
    return written(folder, "recipe.json", values), lambda file: digest_of(find(str(file)).as_dict())


def a_config(folder):
    return pico_llama(folder) / "config.json", lambda file: from_hf(file.parent).parameters()


def a_header(folder):
    return pico_llama(folder) / "model.safetensors", read_header


def a_card(folder):
    sizes = Architecture(num_layers=2, hidden_size=4, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=2,
                         head_dim=2, vocab_size=9)  # fmt: skip
    facts = {"name": "a", "base_model": "b", "source": sizes, "target": sizes, "criterion": "l2,mean", "samples": 1,
             "tokens": 2, "plan_digest": "0" * 64, "command": "minitron compress a"}  # fmt: skip
    file = written(folder, "README.md", FRONT)
    return file, lambda file: card_text(CardFacts(**facts, base_folder=file.parent))


QUESTION = {"context": "a", "choices": ["b", "c"], "answer": 1}
READERS = {
    "plan": a_plan,
    "scores": some_scores,
    "compensation": a_compensation,
    "manifest": of_json(
        {"versions": {"torch": "2"}, "digests": {}, "stages": [{"name": "a", "seconds": 1.5, "digest": "b"}]},
        lambda file: Manifest.open(file).done("a", "b"),
    ),
    "last": of_json({"checkpoint": "nemo/checkpoints/step=3-last", "stopped": 4}, records.read_last),
    "mark": of_json(f'"{digest_of(1)}"', records.read_mark),
    "numbers": of_json([ROW, ROW | {"stage": "pruned"}], records.read_numbers),
    "samples": of_json([{"stage": "teacher", "prompt": "a", "text": "b"}], records.read_samples),
    "candidates": of_json([CANDIDATE], lambda file: read_json(file, "the candidates", records.MEASURED)),
    "ranks": of_json([STANDING], lambda file: read_json(file, "the ranks", records.RANKS)),
    "corpora": of_json(
        {"train": "data/train", "test": "/x/test", "calibration": "data/train"},
        lambda file: read_json(file, RunFolder.corpora, records.CORPORA),
    ),
    "known": of_json({"identity": "a", "loss": 2.5}, lambda file: records.read_known(file, "a")),
    "loss.csv": a_curve,
    "cache.json": a_cache,
    "shard": a_shard,
    "recipe": a_recipe,
    "config": a_config,
    "safetensors": a_header,
    "questions": of_json(QUESTION, read_items),
    "prompts": of_json({"input": "a", "output": "b"}, check_rows),
    "card": a_card,
}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_or_harmless(name, tmp_path):
    file, read = READERS[name](tmp_path)
    read(file)
    whole, refused = file.read_bytes(), []
    damaged = list(mutations.of_bytes(whole, COUNT, seed=name))
    try:
        damaged += mutations.of_values(json.loads(whole), COUNT, seed=name)
    except ValueError:
        damaged.append(mutations.DEEP)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in damaged[:: ONE_IN.get(name, 1)]:
        file.write_bytes(data)
        start = time.monotonic()
        try:
            read(file)
        except InputError as error:
            refused.append(str(error))
        assert time.monotonic() - start < SECONDS
    assert all(len(message) < 2000 and message.isprintable() for message in refused)
    assert refused or name == "card"  # a base's faulty card stops no export
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < BYTES


def test_a_card_whose_dates_are_none_still_says_its_licence(tmp_path):
    file, read = a_card(tmp_path)
    file.write_text(FRONT.replace("2024-01-02", "2024-13-45"))
    assert "license: apache-2.0" in read(file)


def test_a_card_of_aliases_is_not_unfolded(tmp_path):
    """Nine lines that stand for ten to the ninth: each alias is the one before it, ten times."""
    file, read = a_card(tmp_path)
    lines = ["a0: &a0 x", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))]
    file.write_text("\n".join(["---", "license: mit", *lines, "license_name: *a9", "---", ""]))
    assert "license: mit" in read(file)


def test_a_curve_keeps_a_loss_that_went_wrong(tmp_path):
    file, read = a_curve(tmp_path)
    file.write_text("step,tokens,loss\n1,128,nan\n")
    assert read(file) == [(1, 128)]
    file.write_text("step,tokens,loss\nnan,128,1.5\n")
    with pytest.raises(InputError, match="line 2: 'step' is 'nan'"):
        read(file)


def test_a_curve_of_a_huge_cell(tmp_path):
    file, read = a_curve(tmp_path)
    file.write_text("step,tokens,loss\n1,128," + "9" * (csv.field_size_limit() + 1))
    with pytest.raises(InputError, match="no loss curve"):
        read(file)
