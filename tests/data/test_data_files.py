"""Files of text: tables, compression, patterns, fields, chat messages."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from pico import pico_llama
from words import save_tokenizer

from nemo_minitron.commands.finetune import check_rows
from nemo_minitron.data import Tokens, build, check_texts, documents, held_out, load_tokenizer
from nemo_minitron.data.text import BadLines, raw_documents, source_of, with_field
from nemo_minitron.errors import InputError
from nemo_minitron.job.own_model import _data
from nemo_minitron.job.stages.corpora import identity
from nemo_minitron.settings.own_model import OwnModel

TEXTS = ["the first — 京", 'two, "quoted"\nlines', "the third\tword"]
ENDINGS = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.tsv", "a.parquet")


def write(path, texts=TEXTS, field="text"):
    """The texts as a file of the path's kind."""
    rows = [{"id": str(i), field: text} for i, text in enumerate(texts)]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["id", field], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        raw = "\n".join(map(json.dumps, rows)).encode()
        if path.suffix == ".gz":
            raw = gzip.compress(raw)
        if path.suffix == ".zst":
            raw = pyarrow.compress(raw, codec="zstd", asbytes=True)
        path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", ENDINGS)
def test_every_kind_gives_the_same_texts(tmp_path, name):
    assert list(documents(write(tmp_path / name))) == TEXTS
    other = write(tmp_path / f"other-{name}", field="body")
    assert list(documents(f"{other}::body")) == TEXTS
    with pytest.raises(InputError, match=r"has no (field|column) 'text'"):
        list(documents(other))


def test_a_compressed_text_file_is_one_document(tmp_path):
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(b"one\r\ntwo"))
    assert list(documents(tmp_path / "book.txt.gz")) == ["one\r\ntwo"]


def test_a_long_cell_and_a_long_line(tmp_path):
    long = "word " * 300_000
    for name in ("a.csv", "a.jsonl.gz"):
        assert list(documents(write(tmp_path / name, [long, "short"]))) == [long, "short"]


def test_a_pattern_is_its_files_in_order(tmp_path):
    write(tmp_path / "b.csv", ["b"])
    write(tmp_path / "a.jsonl.gz", ["a"])
    (tmp_path / "c.txt").write_text("c")
    pattern = str(tmp_path / "*")
    assert list(documents(pattern)) == ["a", "b", "c"]
    before = identity(pattern)
    write(tmp_path / "b.csv", ["changed"])
    assert identity(pattern) != before
    assert identity(f"{pattern}::text") != identity(pattern)
    with pytest.raises(InputError, match="no file matches"):
        list(documents(str(tmp_path / "*.md")))
    (tmp_path / "d.pdf").touch()
    with pytest.raises(InputError, match=r"d\.pdf', which '.*' matches, is not a file of text"):
        list(documents(pattern))


def test_parts_of_any_file_with_records(tmp_path):
    texts = [f"number {i}" for i in range(1, 41)]
    for name in ("a.parquet", "a.jsonl.zst"):
        file = write(tmp_path / name, texts)
        assert list(documents(f"{file}@held_out")) == ["number 20", "number 40"]
        assert len(list(documents(f"{file}@rest::text"))) == 38
        made = _data(OwnModel(data=str(file), field="text"))
        assert (made.train, made.test) == (f"{file}@rest::text", f"{file}@held_out::text")
        assert held_out(str(file)) == str(file)
    assert held_out("org/name::body") == "org/name@test::body"


def test_a_source_and_its_field():
    assert source_of("text.jsonl@rest::body") == ("text.jsonl", "rest", "body")
    assert source_of("org/name:config@test") == ("org/name:config", "test", "")
    assert with_field("a.csv", "") == "a.csv"
    with pytest.raises(InputError, match="names the field 'x', and --field the field 'y'"):
        with_field("a.csv::x", "y")


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-20], "cannot be read"),
        ("a.jsonl.zst", b"no zstd", "cannot be read"),
        ("a.parquet", b"PAR1 no parquet", "is no Parquet file"),
        ("a.csv", b'text\n"never closed', "is no CSV"),
        ("a.csv", b"text\n\xff", "is not UTF-8"),
        ("a.csv", b"", "has no column 'text'"),
        ("a.csv", b"texts,id\na,1", "did you mean 'texts'"),
    ],
)
def test_damaged_files(tmp_path, name, raw, words):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError) as caught:
        list(documents(tmp_path / name))
    assert words in str(caught.value)
    assert name in str(caught.value)


def test_bad_rows_of_a_table_can_be_left_out(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    bad = BadLines(skip=True)
    assert [d.raw for d in raw_documents(tmp_path / "a.parquet", bad=bad)] == [b"a", b"b"]
    assert (bad.count, "row 2: field 'text' holds NoneType" in bad.first) == (1, True)


# -- chat ------------------------------------------------------------------------------------------------
TALK = [{"role": "user", "content": "the model"}, {"role": "assistant", "content": "reads words"}]
TEMPLATE = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
TEMPLATE += "{{ m.role }} {{ m.content }} {% endfor %}"


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(pico_llama(tmp_path / "model", num_hidden_layers=1), ["the model reads words user assistant"], 509)
    tokenizer = load_tokenizer(tmp_path / "model")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("name", ["talk.jsonl", "talk.parquet"])
@pytest.mark.parametrize("field", ["messages", "talk"])
def test_messages_go_through_the_template(tmp_path, tokenizer, name, field):
    """Under `messages` without a name, under another field by its name; the tokens are those of the written text."""
    rows = [{field: TALK}, {field: TALK[:1]}]
    if name.endswith("jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    source = str(tmp_path / name) + ("" if field == "messages" else f"::{field}")
    tokens = build(source, tokenizer, tmp_path / "tokens")
    for place, text in enumerate(("user the model assistant reads words ", "user the model ")):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokens[place].tolist() == [*ids, tokenizer.eos_token_id]
    assert len(Tokens(tmp_path / "tokens")) == 2


def test_messages_that_cannot_be_written(tmp_path, tokenizer):
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps({"messages": [TALK[0] | {"role": "tool"}]}))
    with pytest.raises(InputError, match=r"line 2: the chat template refuses the messages: no tools"):
        build(file, tokenizer, tmp_path / "tokens")
    assert len(build(file, tokenizer, tmp_path / "tokens", skip_bad_lines=True)) == 1
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="line 1: the model's tokenizer has no chat template"):
        build(file, tokenizer, tmp_path / "other")
    with pytest.raises(InputError, match="line 1 holds chat messages, which need a model's chat template"):
        list(documents(file))


@pytest.mark.parametrize(
    ("texts", "source", "words"),
    [
        ([], "a.jsonl", "holds no text"),
        (TEXTS, "a.csv::body", "has no column 'body'"),
        (TEXTS, "a.parquet::body", "has no column 'body'"),
        (TEXTS, "a.jsonl.gz::body", "line 1 has no field 'body'"),
        (TEXTS, "a.jsonl@rest", "has 3 documents, and every 20th is held out"),
        (TEXTS, "a.jsonl.zst@held_out", "has 3 documents, and every 20th is held out"),
    ],
)
def test_the_first_documents_are_read_before_anything_is_done(tmp_path, texts, source, words):
    name = source.partition("::")[0].partition("@")[0]
    write(tmp_path / name, texts)
    with pytest.raises(InputError, match=words):
        check_texts([str(tmp_path / source)])


def test_a_broken_first_line_is_refused_unless_it_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{oops\n{"text": "two"}\n')
    with pytest.raises(InputError, match="line 2 is not JSON"):
        check_texts([str(tmp_path / "a.jsonl")])
    check_texts([str(tmp_path / "a.jsonl")], skip_bad_lines=True)
    (tmp_path / "a.txt").write_bytes(b"\xff")  # a text file may be large, and is read only once
    check_texts([str(tmp_path / "a.txt")])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_finetune_says_that_it_reads_plain_lines_alone(tmp_path, name):
    write(tmp_path / name)
    with pytest.raises(InputError, match=r"must be plain lines of JSON, a \.jsonl file"):
        check_rows(tmp_path / name)
