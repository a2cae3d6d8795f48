"""What can be said against a source of text in the first second, before a tokenizer is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from nemo_minitron.data.files import TEXT, kind_of, matching, opened
from nemo_minitron.data.indexed import prefix_of
from nemo_minitron.data.text import EVERY, HELD_OUT, BadLines, is_path, raw_documents, refuse_other, source_of


def check_source(source: str) -> None:
    """Raises InputError for a source that means a file and is none, or none of text, before anything loads it."""
    name = source_of(source).name
    if prefix_of(name) is None and matching(name) is None:
        if kind_of(name) or is_path(name):
            opened(Path(name)).close()
        refuse_other(Path(name))


def check_texts(sources: Iterable[str], skip_bad_lines: bool = False) -> None:
    """As `check_source`, and then reads the first documents of files with records: a wrong field, a broken line or too
    few documents to hold some out are refused before a tokenizer is loaded. A later line may still be refused."""
    named = list(dict.fromkeys(sources))
    for source in named:
        check_source(source)
    for source in named:
        _read_first(source, skip_bad_lines)


def _read_first(source: str, skip_bad_lines: bool) -> None:
    parts = source_of(source)
    if prefix_of(parts.name) is None and parts.is_file and kind_of(parts.name) not in TEXT:
        bad, enough = BadLines(skip=skip_bad_lines), 1 if parts.split == HELD_OUT else EVERY
        for _ in itertools.islice(raw_documents(source, bad=bad, render=lambda messages: "any text"), enough):
            pass
