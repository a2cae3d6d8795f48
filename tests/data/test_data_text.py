"""Sources of text: what they yield, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nemo_minitron.data import documents
from nemo_minitron.errors import InputError


def test_jsonl_yields_its_texts_in_order_without_blank_ones(jsonl, texts):
    assert list(documents(jsonl)) == texts


def test_another_field_can_be_named(jsonl):
    assert list(documents(jsonl, field="title")) == ["0", "1", "2", "3", "4", "5"]


def test_a_text_file_is_one_document_with_its_own_newlines(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("one\r\n\r\ntwo — 京\n".encode())
    assert list(documents(path)) == ["one\r\n\r\ntwo — 京\n"]


def test_folders_of_datasets_are_read_by_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    one, two = (datasets.Dataset.from_dict({"text": [name, " "]}) for name in ("first", "second"))
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(str(tmp_path / "both"))
    assert list(documents(tmp_path / "both")) == ["first"]
    assert list(documents(tmp_path / "both", split="test")) == ["second"]
    one.save_to_disk(str(tmp_path / "single"))
    assert list(documents(tmp_path / "single")) == ["first"]
    with pytest.raises(InputError, match=r"no split 'validation'.*legal are train, test"):
        list(documents(tmp_path / "both", split="validation"))


def test_the_split_stands_behind_an_at_unless_it_is_part_of_the_name(tmp_path, jsonl):
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
    assert list(documents(f"{tmp_path / 'both'}@test")) == ["test"]
    assert "no split 'test'" in refused(f"{jsonl}@test")
    odd = jsonl.rename(jsonl.with_name("a@b.jsonl"))
    assert next(documents(odd))


def refused(path, **options) -> str:
    with pytest.raises(InputError) as caught:
        list(documents(path, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file_is_refused_with_the_nearest_there_is(jsonl):
    assert "'corpus.jsonl'" in refused(jsonl.with_name("corpse.jsonl"))
    assert "nor does the folder" in refused(jsonl.parent / "nowhere" / "x.txt")


def test_a_line_that_is_not_json_is_refused_by_number(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": "cut\n')
    assert "line 3 is not JSON" in refused(path)


def test_a_line_without_the_field_is_refused_with_the_fields_there_are(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"texts": "b", "id": 1}) + "\n")
    why = refused(path)
    assert "line 2 has no field 'text'" in why
    assert "'texts'" in why
    assert "holds int, not text" in refused_on(tmp_path, {"text": 3})
    assert "is not an object" in refused_on(tmp_path, ["text"])


def refused_on(folder, record) -> str:
    path = folder / "one.jsonl"
    path.write_text(json.dumps(record) + "\n")
    return refused(path)


def test_nothing_but_blanks_is_refused(tmp_path):
    path = tmp_path / "blank.jsonl"
    path.write_text('{"text": "  "}\n')
    assert "holds no text" in refused(path)
    (tmp_path / "empty.txt").write_text("")
    assert "holds no text" in refused(tmp_path / "empty.txt")


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    assert "byte 3" in refused(path)


def test_a_split_of_a_file_is_refused_not_ignored(jsonl):
    assert "no split 'test'" in refused(jsonl, split="test")


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("text\nhello\n")
    assert ".jsonl" in refused(path)


def test_the_import_is_light():
    code = "import sys, nemo_minitron.data; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "nemo", "megatron", "transformers", "datasets", "lightning"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
