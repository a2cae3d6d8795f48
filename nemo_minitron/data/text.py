"""Sources of text: files (`files.py` reads them), a folder, or anything that `datasets` can load."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nemo_minitron.artifacts.files import read_json
from nemo_minitron.data.files import JSONL, TEXT, Render, documents_of, endings, kind_of, matching, opened, text_of
from nemo_minitron.data.lines import LONG, Document
from nemo_minitron.errors import InputError, first_line

if TYPE_CHECKING:
    from datasets import Dataset


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


class Source(NamedTuple):
    """A source as its parts. `field`: the name of the text in its records; "" if none is written."""

    name: str
    split: str | None
    field: str

    @property
    def is_file(self) -> bool:
        """Whether the name is that of a file of text, or a pattern of such files."""
        return bool(kind_of(self.name)) or matching(self.name) is not None


def source_of(source: str) -> Source:
    """`NAME@SPLIT::FIELD` -> its parts. The name of an existing file or folder may contain an @ or a :: itself."""
    name, _, field = source.rpartition("::")
    if not name or not field or Path(source).exists():
        name, field = source, ""
    return Source(*parted(name), field)


def with_field(source: str, field: str) -> str:
    """The source whose text lies under `field`. Raises InputError if the source names another field already."""
    if not field:
        return source
    if written := source_of(source).field:
        raise InputError(f"'{source}' names the field '{written}', and --field the field '{field}'; give one of them")
    return f"{source}::{field}"


def documents(source: str | Path, split: str | None = None, field: str = "text") -> Iterator[str]:
    """The documents of a source, in its order; blank documents are left out.

    `source` is a text file (.txt, .md: the whole file is one document), a JSONL file (.jsonl, .ndjson: one object a
    line, its text under `field`), either of them compressed (.gz, .zst), a table (.csv, .tsv, .parquet: its text in
    the column `field`), a pattern of such files (`text/*.jsonl`), a folder that `datasets` can load (of .txt files,
    each is one document), or a `datasets` name, with its configuration after a colon where it has several
    (`Salesforce/wikitext:wikitext-2-raw-v1`). The split of a folder or name follows an @
    (`Salesforce/wikitext:wikitext-2-raw-v1@validation`) or is given as `split`; the default is "train". Of files with
    records, `FILE@held_out` is every twentieth document, and `FILE@rest` is all others. A field follows a double colon
    (`text.jsonl::body`).

    Raises InputError for a missing or unreadable source, a line that is not JSON, lacks the field or is not Unicode, a
    split given for a file, and a source without text. The error comes when the bad place is reached, not before.
    """
    for document in raw_documents(source, split, field):
        yield document.raw.decode("utf-8")


def raw_documents(
    source: str | Path, split: str | None = None, field: str = "text", bad: BadLines | None = None,
    render: Render | None = None,
) -> Iterator[Document]:  # fmt: skip
    """As `documents`, but as UTF-8 bytes with their places: a Python text of a long document may take four times the
    memory.

    `bad` decides whether lines that cannot be read are skipped, and counts them. `render` makes text of chat messages,
    a list under `field` or, without a field `text`, under `messages`.
    """
    name, written, named = source_of(str(source))
    split, field, path, bad = written or split, named or field, Path(name), bad or BadLines()
    files = matching(name) or ([path] if kind_of(path) else None)
    if files:
        found = _good((d for file in files for d in documents_of(file, field, render)), bad)
        if split is not None:
            found = _part(found, name, split, single=len(files) == 1 and kind_of(path) in TEXT)
    else:
        texts = _texts_of_folder(path, split or "train")
        read = (d for file in texts for d in documents_of(file, field, render))
        found = _good(read if texts else _dataset(name, split or "train", field, render), bad)
    empty = True
    for document in found:
        if not _blank(document.raw):
            empty = False
            yield document
    if empty:
        raise InputError(f"'{name}' holds no text" + (f"; the first bad line: {bad.first}" if bad.first else ""))


def _good(read: Iterable[Document | InputError], bad: BadLines) -> Iterator[Document]:
    """The documents that could be read; `bad` takes the others."""
    for document in read:
        if isinstance(document, InputError):
            bad.take(document)
        else:
            yield document


def _part(documents: Iterator[Document], path: str, part: str, *, single: bool) -> Iterator[Document]:
    """Every EVERY-th document of a file that is not blank, or all others. `single`: the file is one document."""
    if single:
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


def _dataset(name: str, split: str, field: str, render: Render | None) -> Iterator[Document | InputError]:
    for number, record in enumerate(_load(name, split)):
        where = f"'{name}' ({split}), record {number}"
        try:
            yield Document(text_of(record, field, where, render), where)
        except InputError as error:
            yield error


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
    if is_path(name):
        opened(path)  # refuses it, and names the nearest file
    refuse_other(path)
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


def refuse_other(path: Path) -> None:
    """Raises InputError for a file that holds no text that can be read."""
    if path.is_file() and not kind_of(path):
        raise InputError(f"'{path}' is not a file of text: legal are {endings()}")


def is_path(name: str) -> bool:
    """Whether a source does not exist and was meant as a file or folder, not as a name on the hub."""
    path = Path(name)
    if path.exists():
        return False
    return path.is_absolute() or name.startswith(".") or path.suffix in (".json", ".gz", ".zst", *JSONL)


def _only_split(name: str, split: str, dataset: Dataset) -> Dataset:
    """A dataset saved from one split; the name of that split, if it was saved, must be the requested one."""
    saved = str(dataset.split or split)
    if saved != split:
        raise InputError(f"'{name}' has no split '{split}': legal is '{saved}'")
    return dataset


def _splits(path: Path) -> str:
    names = read_json(path / "dataset_dict.json", "the list of splits")["splits"]
    return f"legal are {', '.join(names)}"
