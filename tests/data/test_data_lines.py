"""Lines that cannot be read: named, or skipped and counted; long ones read as bytes."""

from __future__ import annotations

import io
import json

import pytest

from nemo_minitron.data import build, documents
from nemo_minitron.data import lines as module
from nemo_minitron.data.lines import json_lines, long_line
from nemo_minitron.errors import InputError

BAD = {
    '{"text": "half \\ud83d an emoji"}': r"line 2 holds \\ud83d, half of a surrogate pair",
    '{"n": ' + "1" * 5000 + ', "text": "a"}': r"line 2 cannot be read: Exceeds the limit \(4300 digits\)",
    '{"n": ' + "[" * 100_000 + "]" * 100_000 + ', "text": "a"}': "line 2 cannot be read: it is nested too deeply",
    '{"text": "a"': "line 2 is not JSON",
    '{"other": "a"}': "line 2 has no field 'text'",
    '{"text": 7}': "line 2: field 'text' holds int",
    "[1]": "line 2 is not an object",
    '{"text": "\udce9"}': "line 2 is not UTF-8",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_or_skipped(byte_level, tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one"}}\n{line}\n{{"text": "three"}}\n', errors="surrogateescape")
    with pytest.raises(InputError, match=BAD[line]):
        build(path, byte_level, tmp_path / "out")
    assert not (tmp_path / "out.bin").exists()
    made = build(path, byte_level, tmp_path / "out", skip_bad_lines=True)
    assert (len(made), made.corpus.documents, made.corpus.skipped) == (2, 2, 1)
    assert "line 2" in made.corpus.first_skipped
    with pytest.raises(InputError, match="line 2"):  # what was skipped once is not taken for whole
        build(path, byte_level, tmp_path / "out")


def test_nothing_but_bad_lines_is_refused(byte_level, tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n[\n")
    with pytest.raises(InputError, match=r"holds no text; the first bad line: .* line 1 is not JSON"):
        build(tmp_path / "a.jsonl", byte_level, tmp_path / "out", skip_bad_lines=True)


def test_a_text_that_the_tokenizer_cannot_take_is_named_or_skipped(byte_level, tmp_path, monkeypatch):
    """The tokenizers library panics on some texts (here: an inner function that does): no Exception in Python."""

    class PanicException(BaseException):
        pass

    whole = type(byte_level)._batch_encode_plus

    def panicking(self, *arguments, **options):
        if any("bad" in text for text in (*arguments, *options.values())[0]):
            raise PanicException("AddedVocabulary bad split")
        return whole(self, *arguments, **options)

    monkeypatch.setattr(type(byte_level), "_batch_encode_plus", panicking)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("one", "a bad one", "three")))
    with pytest.raises(InputError, match="line 2 cannot be taken by the tokenizer: AddedVocabulary bad split"):
        build(tmp_path / "a.jsonl", byte_level, tmp_path / "out")
    made = build(tmp_path / "a.jsonl", byte_level, tmp_path / "out", skip_bad_lines=True)
    assert (len(made), made.corpus.documents, made.corpus.bytes, made.corpus.skipped) == (2, 2, 8, 1)
    assert made.tokens == sum(len(made[i]) for i in range(2))


@pytest.mark.parametrize("ascii_", [True, False])
def test_a_long_line_is_read_as_json_reads_it(monkeypatch, ascii_):
    monkeypatch.setattr(module, "LONG", 40)
    text = 'quotes " and \\ and \\\\" \n\u0001 é 京 🙂 \U00010000 \\u0041 end\\' * 3000
    other = {"a": ["short", text[:50], 'x"'], "text": text, "n": 1.5}
    line = json.dumps(other, ensure_ascii=ascii_).encode()
    record, spelt = long_line(line, "here")
    assert spelt(record["text"]) == text.encode()
    assert spelt(record["a"][1]) == text[:50].encode()
    assert (record["a"][0], record["a"][2], record["n"], spelt("short")) == ("short", 'x"', 1.5, None)


@pytest.mark.parametrize(
    ("inside", "message"),
    [("\\ud83d", "half of a surrogate pair"), ("\n", "not JSON"), ("\\x", "not JSON"), ("\udce9", "not UTF-8")],
)
def test_a_long_line_is_refused_as_a_short_one(monkeypatch, tmp_path, inside, message):
    monkeypatch.setattr("nemo_minitron.data.text.LONG", 10)
    monkeypatch.setattr(module, "LONG", 20)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "a" * 30 + inside + "b" * 30 + '"}', errors="surrogateescape", newline="")
    with pytest.raises(InputError, match=message):
        list(documents(path))


def test_a_text_file_that_is_not_utf8_names_line_and_byte(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "LONG", 4)  # also where a character lies across two pieces
    path = tmp_path / "a.txt"
    path.write_bytes("aé京\nb🙂\n".encode() + b"x\xe4y")
    with pytest.raises(InputError, match=r"line 3 is not UTF-8: byte 14 of the file"):
        list(documents(path))
    path.write_bytes("aé京\nb🙂\n".encode())
    assert list(documents(path)) == ["aé京\nb🙂\n"]


def test_a_folder_of_texts_is_a_file_a_document(byte_level, tmp_path):
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"one\r\n\r\ntwo\n")
    (folder / "inner" / "c.txt").write_text("three\nfour\n")
    assert sorted(documents(folder)) == ["one\r\n\r\ntwo\n", "three\nfour\n"]
    (folder / "inner" / "c.txt").write_bytes(b"\xe9")
    with pytest.raises(InputError, match=r"c\.txt', line 1 is not UTF-8"):
        list(documents(folder))
    assert len(build(folder, byte_level, tmp_path / "out", skip_bad_lines=True)) == 1
    splits = tmp_path / "splits"
    splits.mkdir()
    for name in ("train", "test"):
        (splits / f"{name}.txt").write_text(f"{name}\nlines\n")
    assert list(documents(f"{splits}@test")) == ["test\nlines\n"]
    assert list(documents(splits)) == ["train\nlines\n"]
    with pytest.raises(InputError, match="has no split 'validation': legal are"):
        list(documents(f"{splits}@validation"))


def test_the_lines_of_a_file_have_their_numbers_and_blank_ones_count():
    file = io.BytesIO(b'{"a": 1}\r\n\n \t\n{"b": 2}')
    assert list(json_lines(file, "rows.jsonl")) == [
        ("'rows.jsonl', line 1", b'{"a": 1}\r\n'),
        ("'rows.jsonl', line 4", b'{"b": 2}'),
    ]
