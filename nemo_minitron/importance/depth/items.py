"""Multiple-choice questions in a JSONL file. Loads neither torch nor Megatron."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_minitron.artifacts.files import parse_json
from nemo_minitron.errors import InputError


@dataclasses.dataclass(frozen=True)
class Item:
    """A question. Each choice continues `context`, which also has the examples of a few-shot task."""

    context: str
    choices: tuple[str, ...]
    answer: int


def read_items(path: str | Path) -> list[Item]:
    """A JSONL file of objects with `context`, `choices` (at least two texts) and `answer` (an index).

    Raises InputError, with the line's number, for a line that is no such object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # not at U+2028, which JSON may hold
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the questions '{path}' cannot be read ({error})") from None
    items = [_item(line, f"'{path}', line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise InputError(f"'{path}' holds no question; it needs lines with context, choices and answer")
    return items


def _item(line: str, where: str) -> Item:
    try:
        read = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where} is no JSON ({error})") from None
    missing = [key for key in ("context", "choices", "answer") if not isinstance(read, dict) or key not in read]
    if missing:
        raise InputError(f"{where} has no '{missing[0]}'; it needs context, choices and answer")
    context, choices, answer = read["context"], read["choices"], read["answer"]
    if not isinstance(context, str):
        raise InputError(f"{where}: context is {context!r}; it must be a text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise InputError(f"{where}: choices are {choices!r}; they must be a list of at least two texts, none empty")
    if any("\ud800" <= character <= "\udfff" for text in (context, *choices) for character in text):
        raise InputError(f"{where} holds half of a surrogate pair, which is no character; mend the text")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        near = min(max(answer, 0), len(choices) - 1) if isinstance(answer, int) else 0
        raise InputError(f"{where}: answer is {answer!r}; legal are 0 to {len(choices) - 1}, the nearest is {near}")
    return Item(context, tuple(choices), answer)
