"""Which teachers a student can learn from, by their vocabularies."""

import pytest
from pico import pico_llama
from words import save_tokenizer

from nemo_minitron.commands.vocabularies import common_vocabulary, remark
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
        ("bare", 420, None, None),
    ):  # fmt: skip
        pico_llama(folder / name, vocab_size=rows, num_hidden_layers=1)
        if tokens:
            save_tokenizer(folder / name, texts, tokens)
        made[name] = HFSource(folder / name)
    return made


@pytest.mark.parametrize(("student", "teacher"), [("small", "large"), ("large", "small"), ("small", "more")])
def test_one_has_more_rows(models, student, teacher):
    """Whichever it is; the teacher's tokenizer may go on with more tokens."""
    pair = models[student], models[teacher]
    assert common_vocabulary(*pair) == 400
    assert "it learns the 400 that both begin with" in remark(*pair, 400)


def test_one_vocabulary_needs_no_tokenizer(models):
    assert common_vocabulary(models["bare"], models["other"]) is None


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            "small",
            "other",
            r"the teacher has 420 .* the student has 400, and token \d+ is '.+' to the student and '.+'",
        ),
        ("more", "small", "and the student's tokenizer makes tokens up to 409"),
        ("small", "bare", "bare' gives no tokenizer"),
    ],
)
def test_refused(models, student, teacher, message):
    with pytest.raises(InputError, match=message):
        common_vocabulary(models[student], models[teacher])
