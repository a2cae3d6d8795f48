"""Sources of text: a text file, a JSONL file, a folder, or anything that `datasets` can load."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nemo_minitron.artifacts.files import read_json
from nemo_minitron.data.lines import LONG, Document, checked_utf8, json_lines, long_line, read_line, utf8
from nemo_minitron.errors import InputError, first_line, nearest

if TYPE_CHECKING:
    from datasets import Dataset


TEXT, JSONL = (".txt", ".md"), (".jsonl", ".ndjson")
EVERY = 20  # of a JSONL file's documents, every twentieth is in its part HELD_OUT, and all others in REST
REST, HELD_OUT = "rest", "held_out"


@dataclasses.dataclass
class BadLines:
    """Lines that cannot be read. `skip`: leave them out and count them; `first` says what was wrong with the first
    one."""

    skip: bool = False
    count: int = 0
    first: str = ""

    def take(self, error: InputError) -> None:
        """Counts a bad line. Raises `error` if bad lines are not skipped."""
        if not self.skip:
            raise error
        self.count += 1
        self.first = self.first or str(error)


def documents(source: str | Path, split: str | None = None, field: str = "text") -> Iterator[str]:
    """The documents of a source, in its order; blank documents are left out.

    `source` is a text file (.txt, .md: the whole file is one document), a JSONL file (.jsonl, .ndjson: one object a
    line, its text under `field`), a folder that `datasets` can load (of .txt files, each is one document), or a
    `datasets` name, with its configuration after a colon where it has several
    (`Salesforce/wikitext:wikitext-2-raw-v1`). The split of a folder or name follows an @
    (`Salesforce/wikitext:wikitext-2-raw-v1@validation`) or is given as `split`; the default is "train". Of a JSONL
    file, `FILE@held_out` is every twentieth document, and `FILE@rest` is all others.

    Raises InputError for a missing or unreadable source, a line that is not JSON, lacks the field or is not Unicode, a
    split given for a file, and a source without text. The error comes when the bad place is reached, not before.
    """
    for document in raw_documents(source, split, field):
        yield document.raw.decode("utf-8")


def raw_documents(
    source: str | Path, split: str | None = None, field: str = "text", bad: BadLines | None = None
) -> Iterator[Document]:
    """As `documents`, but as UTF-8 bytes with their places: a Python text of a long document may take four times the
    memory.

    `bad` decides whether lines that cannot be read are skipped, and counts them.
    """
    source, written = parted(str(source))
    split, path, bad = written or split, Path(source), bad or BadLines()
    if path.suffix in (*TEXT, *JSONL):
        documents_of_source = _text_files([path], bad) if path.suffix in TEXT else _jsonl(path, field, bad)
        if split is not None:
            documents_of_source = _part(documents_of_source, path, split)
    else:
        files = _texts_of_folder(path, split or "train")
        documents_of_source = _text_files(files, bad) if files else _dataset(source, split or "train", field, bad)
    empty = True
    for document in documents_of_source:
        if not _blank(document.raw):
            empty = False
            yield document
    if empty:
        raise InputError(f"'{source}' holds no text" + (f"; the first bad line: {bad.first}" if bad.first else ""))


def _part(documents: Iterator[Document], path: Path, part: str) -> Iterator[Document]:
    """Every EVERY-th document of a JSONL file that is not blank, or all others."""
    if path.suffix in TEXT:
        raise InputError(f"'{path}' is one document and has no split '{part}': leave the split out")
    if part not in (REST, HELD_OUT):
        raise InputError(f"'{path}' is one file and has no split '{part}': leave it out, or take {REST} or {HELD_OUT}")
    number = 0
    for document in documents:
        if not _blank(document.raw):
            number += 1
            if (number % EVERY == 0) == (part == HELD_OUT):
                yield document
    if number < EVERY:
        raise InputError(
            f"'{path}' has {number} documents, and every {EVERY}th is held out; give held-out text of its own"
        )


def parted(source: str) -> tuple[str, str | None]:
    """`name@split` -> (name, split); the name of an existing file or folder may contain an @ itself."""
    name, _, split = source.rpartition("@")
    return (name, split) if name and split and not Path(source).exists() else (source, None)


def _blank(raw: bytes | bytearray) -> bool:
    """Whether a document is blank; a long one is checked as bytes, which do not count Unicode's wider spaces as
    blank."""
    return raw.isspace() if len(raw) > LONG else not raw.decode("utf-8").strip()


def _text_files(paths: list[Path], bad: BadLines) -> Iterator[Document]:
    for path in paths:
        with _open(path) as file:
            raw = file.read()
        try:
            raw = checked_utf8(raw, f"'{path}'")
        except InputError as error:
            bad.take(error)
            continue
        yield Document(raw, f"'{path}'")


def _jsonl(path: Path, field: str, bad: BadLines) -> Iterator[Document]:
    with _open(path) as file:
        for where, line in json_lines(file, str(path)):
            try:
                raw = _text_of_line(line, field, where)
            except InputError as error:
                bad.take(error)
                continue
            del line  # free its memory before the document is used: it may be long
            yield Document(raw, where)


def _text_of_line(line: bytes, field: str, where: str) -> bytes | bytearray:
    if len(line) <= LONG:
        return utf8(_text_of(read_line(line, where), field, where), where)
    record, spelt = long_line(line, where)
    text = _text_of(record, field, where)
    return spelt(text) or utf8(text, where)


def _dataset(name: str, split: str, field: str, bad: BadLines) -> Iterator[Document]:
    for number, record in enumerate(_load(name, split)):
        where = f"'{name}' ({split}), record {number}"
        try:
            raw = utf8(_text_of(record, field, where), where)
        except InputError as error:
            bad.take(error)
            continue
        yield Document(raw, where)


def _texts_of_folder(path: Path, split: str) -> list[Path]:
    """The files of a split, if `datasets` would read the folder as plain text, where it makes each line a document.

    `datasets` still decides which files belong to which split. Raises InputError if the split does not exist.
    """
    if not path.is_dir() or any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return []
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(path))
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"`datasets` cannot load '{path}', split '{split}': {first_line(error)}") from error
    files = builder.config.data_files or {}
    if builder.name != "text" or any(Path(file).suffix not in TEXT for named in files.values() for file in named):
        return []
    if split not in files:
        raise InputError(f"'{path}' has no split '{split}': legal are {', '.join(map(str, files))}")
    return [Path(file) for file in files[split]]


def _load(name: str, split: str) -> Dataset:
    """A `datasets.Dataset` from a folder written by save_to_disk, from any other folder, or from a name."""
    path = Path(name)
    if not path.exists() and _is_path(path, name):
        raise InputError(f"'{name}' does not exist{_beside(path)}")
    if path.is_file():
        raise InputError(f"'{name}' is not a file of text: legal are {', '.join((*TEXT, *JSONL))}")
    import datasets

    try:
        if (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(name)[split]
        if (path / "state.json").exists():
            return _only_split(name, split, datasets.load_from_disk(name))
        repository, _, configuration = (name, "", "") if path.exists() else name.partition(":")
        return datasets.load_dataset(repository, configuration or None, split=split)
    except KeyError:
        raise InputError(f"'{name}' has no split '{split}': {_splits(path)}") from None
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"`datasets` cannot load '{name}', split '{split}': {first_line(error)}") from error


def _is_path(path: Path, name: str) -> bool:
    """Whether a source that does not exist was meant as a file or folder and not as a name on the hub."""
    return path.is_absolute() or name.startswith(".") or path.suffix in (".json", ".gz", ".zst", ".parquet")


def _only_split(name: str, split: str, dataset: Dataset) -> Dataset:
    """A dataset saved from one split; the name of that split, if it was saved, must be the requested one."""
    saved = str(dataset.split or split)
    if saved != split:
        raise InputError(f"'{name}' has no split '{split}': legal is '{saved}'")
    return dataset


def _splits(path: Path) -> str:
    names = read_json(path / "dataset_dict.json", "the list of splits")["splits"]
    return f"legal are {', '.join(names)}"


def _text_of(record: object, field: str, where: str) -> str:
    """The text of one record. Raises InputError, which names the nearest field, if the field is missing."""
    if not isinstance(record, Mapping):
        raise InputError(f"{where} is not an object with a field '{field}'")
    if field not in record:
        raise InputError(f"{where} has no field '{field}': {nearest(field, record)}")
    if not isinstance(record[field], str):
        raise InputError(f"{where}: field '{field}' holds {type(record[field]).__name__}, not text")
    return record[field]


def _open(path: Path) -> BinaryIO:
    """The file, opened for bytes: newlines stay unchanged, so that byte counts are those of the file."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"'{path}' does not exist{_beside(path)}") from None
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}") from None


def _beside(path: Path) -> str:
    """The files that the folder has instead, for the end of a refusal."""
    if not path.parent.is_dir():
        return f", nor does the folder '{path.parent}'"
    names = [p.name for p in path.parent.iterdir() if p.suffix in (*TEXT, *JSONL)]
    return f": {nearest(path.name, names)}" if names else ""
