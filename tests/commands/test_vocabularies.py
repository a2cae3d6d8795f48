"""Which teachers a student can learn from, by their vocabularies."""

import json
import shutil

import pytest
from pico import pico_llama
from words import save_tokenizer

from nemo_minitron.commands.vocabularies import Shared, check_one_vocabulary, shared_vocabulary
from nemo_minitron.errors import InputError
from nemo_minitron.sources.folder import HFSource

TEXTS = [f"the model number {i} reads {i * 7} words and the next {'word ' * (i % 9)}ends." for i in range(60)]
OTHER = [f"quite {i} unlike sentences, {i * 3} of them, {'which ' * (i % 5)}differ!" for i in range(60)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> a model: rows of its vocabulary, tokens and texts of its tokenizer."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    for name, rows, tokens, texts in (
        ("small", 400, 390, TEXTS), ("large", 420, 390, TEXTS), ("other", 420, 390, OTHER), ("more", 420, 410, TEXTS),
        ("bare", 420, None, None), ("short", 400, 395, TEXTS),
    ):  # fmt: skip
        pico_llama(folder / name, vocab_size=rows, num_hidden_layers=1)
        if tokens:
            save_tokenizer(folder / name, texts, tokens)
        made[name] = HFSource(folder / name)
    return made


@pytest.mark.parametrize(("student", "teacher"), [("small", "large"), ("large", "small"), ("small", "more")])
def test_one_has_more_rows(models, student, teacher):
    """Whichever it is; the teacher's tokenizer may go on with more tokens."""
    shared = shared_vocabulary(models[student], models[teacher])
    assert shared.tokens == 400
    assert "it learns the 400 that both begin with" in shared.remark


def test_as_many_rows(models, tmp_path):
    """One tokenizer, in the same files or in others; the teacher's may go on; without one nothing can be compared."""
    assert shared_vocabulary(models["large"], models["large"]) == Shared()
    assert shared_vocabulary(models["large"], models["more"]) == Shared()
    written = shutil.copytree(models["large"].folder, tmp_path / "written") / "tokenizer.json"
    written.write_text(json.dumps(json.loads(written.read_text())))
    assert check_one_vocabulary(models["large"].folder, tmp_path / "written", 420) == ""
    for pair, words in ((("bare", "other"), "the student has no"), (("other", "bare"), "the teacher has no")):
        shared = shared_vocabulary(*(models[name] for name in pair))
        assert shared.tokens is None
        assert f"{words} tokenizer to open, so nothing says" in shared.remark


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            "small",
            "other",
            r"the teacher has 420 .* the student has 400, and token \d+ is '.+' to the student and '.+'",
        ),
        ("more", "small", "and the student's tokenizer makes tokens up to 409"),
        ("short", "large", r"and token 390 is '.+' to the student and none to the teacher"),
        ("small", "bare", "bare' gives no tokenizer"),
        ("large", "other", r"both have 420 .*, but token \d+ is '.+' to the student and '.+' to the teacher"),
        ("more", "large", r"both have 420 .*, but token 390 is '.+' to the student and none to the teacher"),
    ],
)
def test_refused(models, student, teacher, message):
    with pytest.raises(InputError, match=message):
        shared_vocabulary(models[student], models[teacher])
