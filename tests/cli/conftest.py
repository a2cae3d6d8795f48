"""One finished run of the main job for all tests of this folder."""

import json

import pytest
from command_line import RECIPE, TEXTS, minitron
from pico import pico_llama
from words import save_tokenizer


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A teacher, a corpus, and `run`: what `minitron compress` made of them."""
    folder = tmp_path_factory.mktemp("compress")
    pico_llama(folder / "teacher", vocab_size=509)
    save_tokenizer(folder / "teacher", TEXTS, 509)  # NeMo exports as many rows as the tokenizer has
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (folder / "recipe.py").write_text(RECIPE)
    minitron(folder, "compress", "recipe.py", "--out", "run")
    return folder
