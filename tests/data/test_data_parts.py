"""The held-out part of a JSONL file, and the rest."""

import json

import pytest

from nemo_minitron.data.text import BadLines, documents, raw_documents
from nemo_minitron.errors import InputError
from nemo_minitron.job.stages.corpora import identity


@pytest.fixture
def file(tmp_path):
    """45 documents, with blank ones and a bad line between them."""
    lines = [json.dumps({"text": str(number)}) for number in range(1, 46)]
    lines[3:3], lines[30:30] = [json.dumps({"text": " "})], ["{bad"]
    (tmp_path / "a@b.jsonl").write_text("\n".join(lines))
    return tmp_path / "a@b.jsonl"


def test_every_twentieth_document_is_held_out(file):
    parts = [
        [document.raw.decode() for document in raw_documents(f"{file}@{part}", bad=BadLines(skip=True))]
        for part in ("held_out", "rest")
    ]
    assert parts[0] == ["20", "40"]
    assert sorted(map(int, parts[0] + parts[1])) == list(range(1, 46))


def test_parts_are_different_texts(file):
    assert len({json.dumps(identity(f"{file}{part}")) for part in ("", "@rest", "@held_out")}) == 3


def test_refused(file, tmp_path):
    with pytest.raises(
        InputError, match="is one file and has no split 'train': leave it out, or take rest or held_out"
    ):
        list(documents(f"{file}@train"))
    (tmp_path / "t.txt").write_text("words")
    with pytest.raises(InputError, match="is one document and has no split 'rest'"):
        list(documents(f"{tmp_path / 't.txt'}@rest"))
    (tmp_path / "few.jsonl").write_text('{"text": "a"}\n' * 19)
    for part in ("rest", "held_out"):
        with pytest.raises(InputError, match="has 19 documents, and every 20th is held out"):
            list(documents(f"{tmp_path / 'few.jsonl'}@{part}"))
