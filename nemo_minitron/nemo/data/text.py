"""Where text comes from: a text file, a JSONL file, or whatever `datasets` can load."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.errors import InputError, first_line, nearest

TEXT, JSONL = (".txt", ".md"), (".jsonl", ".ndjson")


def documents(source: str | Path, split: str | None = None, field: str = "text") -> Iterator[str]:
    """The documents of a source, in its order; those with nothing but white space are left out.

    `source` is a text file (.txt, .md: the whole file is one document), a JSONL file (.jsonl, .ndjson: one
    object a line, its text under `field`), a folder that `datasets` can load, or a `datasets` name, with
    its configuration after a colon where it has several (`Salesforce/wikitext:wikitext-2-raw-v1`).
    The split of a folder or name stands behind an @ (`Salesforce/wikitext:wikitext-2-raw-v1@validation`),
    or is given as `split`; else it is "train".

    Raises InputError: missing or unreadable source, a line that is not JSON or lacks the field, a split
    given for a file, no text at all. Each comes when the bad place is reached, not before.
    """
    source, written = parted(str(source))
    split, path = written or split, Path(source)
    if path.suffix in (*TEXT, *JSONL):
        if split is not None:
            raise InputError(f"'{source}' is one file and has no split '{split}': leave the split out")
        found = _text_file(path) if path.suffix in TEXT else _jsonl(path, field)
    else:
        found = _dataset(source, split or "train", field)
    empty = True
    for text in found:
        if text.strip():
            empty = False
            yield text
    if empty:
        raise InputError(f"'{source}' holds no text")


def parted(source: str) -> tuple[str, str | None]:
    """`name@split` -> (name, split); a file or folder whose own name has an @ is taken as it is."""
    name, _, split = source.rpartition("@")
    return (name, split) if name and split and not Path(source).exists() else (source, None)


def _text_file(path: Path) -> Iterator[str]:
    with _open(path) as file:
        try:
            yield file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"'{path}' is not UTF-8: byte {error.start} does not decode") from None


def _jsonl(path: Path, field: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"'{path}', line {number}"
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                raise InputError(f"{where} is not UTF-8: byte {error.start} does not decode") from None
            except json.JSONDecodeError as error:
                raise InputError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
            yield _text_of(record, field, where)


def _dataset(name: str, split: str, field: str) -> Iterator[str]:
    for number, record in enumerate(_load(name, split)):
        yield _text_of(record, field, f"'{name}' ({split}), record {number}")


def _load(name: str, split: str) -> Any:
    """A `datasets.Dataset`: from a folder written by save_to_disk, any other folder, or a name."""
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
    """Whether a source that does not exist was meant as a file or folder, not as a name on the hub."""
    return path.is_absolute() or name.startswith(".") or path.suffix in (".json", ".gz", ".zst", ".parquet")


def _only_split(name: str, split: str, dataset: Any) -> Any:
    """A folder saved from one split: the name it was saved under, if any, must be the one asked for."""
    saved = str(dataset.split or split)
    if saved != split:
        raise InputError(f"'{name}' has no split '{split}': legal is '{saved}'")
    return dataset


def _splits(path: Path) -> str:
    names = json.loads((path / "dataset_dict.json").read_text())["splits"]
    return f"legal are {', '.join(names)}"


def _text_of(record: Any, field: str, where: str) -> str:
    """The text of one record; InputError says which fields there are."""
    if not isinstance(record, Mapping):
        raise InputError(f"{where} is not an object with a field '{field}'")
    if field not in record:
        raise InputError(f"{where} has no field '{field}': {nearest(field, record)}")
    if not isinstance(record[field], str):
        raise InputError(f"{where}: field '{field}' holds {type(record[field]).__name__}, not text")
    return record[field]


def _open(path: Path) -> Any:
    """The file, opened for bytes: newlines stay as they are, so that byte counts are the file's own."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"'{path}' does not exist{_beside(path)}") from None
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}") from None


def _beside(path: Path) -> str:
    """What the folder has instead, for the end of a refusal."""
    if not path.parent.is_dir():
        return f", nor does the folder '{path.parent}'"
    names = [p.name for p in path.parent.iterdir() if p.suffix in (*TEXT, *JSONL)]
    return f": {nearest(path.name, names)}" if names else ""
