"""Files of text: plain, JSON lines, CSV and Parquet, also compressed, and several of them by a pattern."""

from __future__ import annotations

import csv
import glob
import gzip
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from nemo_minitron.data.lines import LONG, Document, checked_utf8, json_lines, long_line, read_line, utf8
from nemo_minitron.errors import InputError, first_line, nearest

TEXT, JSONL, TABLES = (".txt", ".md"), (".jsonl", ".ndjson"), (".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")
MESSAGES = "messages"
Render = Callable[[list[Any]], str]
Reader = Callable[[object, str], bytes | bytearray]  # (record, place) -> the text


def kind_of(name: str | Path) -> str:
    """The ending that says how a file is read, without that of its compression; "" for another file."""
    path = Path(name)
    ending = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    legal = (*TEXT, *JSONL, *(TABLES if path.suffix not in COMPRESSED else ()))
    return ending if ending in legal else ""


def matching(name: str) -> list[Path] | None:
    """The files that a pattern such as `text/*.jsonl.gz` names, sorted. None if it is no pattern, or names an existing
    file. Raises InputError if it names nothing, or a file that holds no text."""
    if not glob.has_magic(name) or Path(name).exists():
        return None
    files = sorted(path for path in map(Path, glob.glob(name, recursive=True)) if path.is_file())
    if not files:
        raise InputError(f"no file matches '{name}'")
    for path in files:
        if not kind_of(path):
            raise InputError(f"'{path}', which '{name}' matches, is not a file of text: legal are {endings()}")
    return files


def endings() -> str:
    """The endings of files that can be read, for a refusal."""
    return f"{', '.join((*TEXT, *JSONL))} (also with {' or '.join(COMPRESSED)}), {', '.join(TABLES)}"


def documents_of(path: Path, field: str, render: Render | None) -> Iterator[Document | InputError]:
    """The documents of a file, in its order; a record that cannot be read is given as the error that says why.

    `field`: the name of the text in records and columns; it may hold chat messages, which `render` makes text of.
    Raises InputError for a file that is missing, or cannot be read further.
    """
    kind = kind_of(path)
    if kind in TEXT:
        yield _text_file(path)
        return
    records = _jsonl if kind in JSONL else _parquet if kind == ".parquet" else _csv
    try:
        yield from records(path, field, render)
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise InputError(f"'{path}' cannot be read: {first_line(error)}") from None


def _text_file(path: Path) -> Document | InputError:
    with opened(path) as file:
        try:
            return Document(checked_utf8(file.read(), f"'{path}'"), f"'{path}'")
        except InputError as error:
            return error
        except (EOFError, OSError) as error:
            raise InputError(f"'{path}' cannot be read: {first_line(error)}") from None


def _jsonl(path: Path, field: str, render: Render | None) -> Iterator[Document | InputError]:
    with opened(path) as file:
        for where, line in json_lines(file, str(path)):
            try:
                raw = _text_of_line(line, field, where, render)
            except InputError as error:
                yield error
                continue
            del line  # free its memory before the document is used: it may be long
            yield Document(raw, where)


def _text_of_line(line: bytes, field: str, where: str, render: Render | None) -> bytes | bytearray:
    if len(line) <= LONG:
        return text_of(read_line(line, where), field, where, render)
    record, spelt = long_line(line, where)
    if isinstance(record, Mapping) and isinstance(record.get(field), str):
        return spelt(record[field]) or utf8(record[field], where)
    return text_of(read_line(line, where), field, where, render)


def _csv(path: Path, field: str, render: Render | None) -> Iterator[Document | InputError]:
    csv.field_size_limit(2**31 - 1)  # a document is longer than the default, 131,072 characters
    with opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            if rows.fieldnames is None or field not in rows.fieldnames:
                raise InputError(f"'{path}' has no column '{field}': {nearest(field, rows.fieldnames or ())}")
            for row in rows:
                where = f"'{path}', line {rows.line_num}"
                yield _read(row, field, where, None)
        except UnicodeDecodeError as error:
            raise InputError(f"'{path}' is not UTF-8: byte {error.start} does not decode") from None
        except csv.Error as error:
            raise InputError(f"'{path}', line {rows.line_num} is no CSV: {error}") from None


def _parquet(path: Path, field: str, render: Render | None) -> Iterator[Document | InputError]:
    import pyarrow
    import pyarrow.parquet

    with opened(path) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            column = MESSAGES if field == "text" and field not in names and MESSAGES in names else field
            if column not in names:
                raise InputError(f"'{path}' has no column '{field}': {nearest(field, names)}")
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                for record in batch.to_pylist():
                    number += 1
                    yield _read(record, field, f"'{path}', row {number}", render)
        except pyarrow.ArrowException as error:
            raise InputError(f"'{path}' is no Parquet file: {first_line(error)}") from None


def _read(record: object, field: str, where: str, render: Render | None) -> Document | InputError:
    try:
        return Document(text_of(record, field, where, render), where)
    except InputError as error:
        return error


def text_of(record: object, field: str, where: str, render: Render | None) -> bytes:
    """The text of one record, UTF-8. A record without the default field `text` that has chat `messages` gives these.
    Raises InputError, which names the nearest field, if the field is missing or holds neither text nor messages."""
    if not isinstance(record, Mapping):
        raise InputError(f"{where} is not an object with a field '{field}'")
    if field == "text" and field not in record and isinstance(record.get(MESSAGES), list):
        field = MESSAGES
    if field not in record:
        raise InputError(f"{where} has no field '{field}': {nearest(field, map(str, record))}")
    value = record[field]
    if isinstance(value, list) and _are_messages(value):
        value = _rendered(value, where, render)
    if not isinstance(value, str):
        raise InputError(f"{where}: field '{field}' holds {type(value).__name__}, not text")
    return utf8(value, where)


def _are_messages(value: list[Any]) -> bool:
    """Whether a list holds chat messages, each with a role and a content that are texts."""
    keys = ("role", "content")
    return bool(value) and all(isinstance(m, Mapping) and all(isinstance(m.get(k), str) for k in keys) for m in value)


def _rendered(messages: list[Any], where: str, render: Render | None) -> str:
    if render is None:
        raise InputError(f"{where} holds chat messages, which need a model's chat template; give text here")
    try:
        return render(messages)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def opened(path: Path) -> BinaryIO:
    """The file, opened for bytes and decompressed: newlines stay unchanged, so that byte counts are those of the text.
    Raises InputError for a file that is missing or cannot be opened."""
    try:
        if path.suffix == ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        if path.suffix == ".zst":
            import pyarrow

            return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"'{path}' does not exist{_beside(path)}") from None
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror or first_line(error)}") from None


def _beside(path: Path) -> str:
    """The files that the folder has instead, for the end of a refusal."""
    if not path.parent.is_dir():
        return f", nor does the folder '{path.parent}'"
    names = [p.name for p in path.parent.iterdir() if kind_of(p)]
    return f": {nearest(path.name, names)}" if names else ""
