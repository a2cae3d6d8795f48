"""Reads lines of JSON and files of text as UTF-8 bytes; a refusal is one sentence that names the place."""

from __future__ import annotations

import codecs
import json
import re
import uuid
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from nemo_minitron.artifacts.json_types import Json
from nemo_minitron.errors import InputError

LONG = 1 << 20  # bytes; a longer text is handled in pieces, because Python's own copies may take four times as much
PART = re.compile(
    rb"(?:[^\\]{1,4096}|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.){1,64}",
    re.DOTALL,
)
"""Matches up to 256 KiB inside a JSON string and ends between two characters; a surrogate pair counts as one."""


class Document(NamedTuple):
    raw: bytes | bytearray  # UTF-8
    where: str  # its origin, file and line, for a sentence


def json_lines(file: BinaryIO, name: str) -> Iterator[tuple[str, bytes]]:
    """(place for a message, line) of each line of an open JSONL file that is not blank; `name`: the file's.

    The line is not kept here while the caller uses it, because it may be long.
    """
    number = 0
    while line := file.readline():
        number += 1
        if not line.isspace():
            handed = [line]
            del line
            yield f"'{name}', line {number}", handed.pop()


def read_line(line: bytes | str, where: str) -> Json:
    """The value of a line of JSON. Raises InputError if the line is not JSON, or Python cannot parse it."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: byte {error.start} does not decode") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise InputError(f"{where} cannot be read: it is nested too deeply") from None
    except ValueError as error:  # a whole number with thousands of digits
        raise InputError(f"{where} cannot be read: {str(error).partition(';')[0]}") from None


def utf8(text: str, where: str) -> bytes:
    """A text's UTF-8 bytes. Raises InputError for half of a surrogate pair: JSON can spell it, UTF-8 cannot."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds \\u{ord(text[error.start]):04x}, half of a surrogate pair, which is no character: "
            "mend the text, or leave such lines out with --skip-bad-lines"
        ) from None


def checked_utf8(raw: bytes, where: str) -> bytes:
    """Returns `raw` if it is UTF-8. Otherwise raises InputError, which names the line."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        for done in range(0, len(raw), LONG):
            decoder.decode(raw[done : done + LONG], final=done + LONG >= len(raw))
    except UnicodeDecodeError as error:
        kept = len(error.object) - len(raw[done : done + LONG])  # bytes left over from the piece before
        at = done + error.start - kept
        line = raw.count(b"\n", 0, at) + 1
        raise InputError(f"{where}, line {line} is not UTF-8: byte {at} of the file does not decode") from None
    return raw


def long_line(line: bytes, where: str) -> tuple[Json, Callable[[str], bytearray | None]]:
    """The value of a long line with a placeholder for each long string, and a function from placeholder to bytes.

    Python's parser would take several times the line's size; this way a long string is decoded only when it is used.
    The function returns None for a text that is not a placeholder. Raises InputError as `read_line` does; the function
    as `utf8` does.
    """
    mark, short, places, done = uuid.uuid4().hex, bytearray(), dict[str, tuple[int, int]](), 0
    for start, end in _strings(line):
        if end - start > LONG:
            word = f"{mark}-{len(places)}"
            places[word] = start, end
            short += line[done:start] + b'"' + word.encode() + b'"'
            done = end
    short += line[done:]
    value = read_line(bytes(short), where)

    def spelt(word: str) -> bytearray | None:
        return _string(line, *places[word], where) if word in places else None

    return value, spelt


def _strings(line: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of each string in a line of JSON, quotes included."""
    start = line.find(b'"')
    while start >= 0:
        end = line.find(b'"', start + 1)
        while end >= 0 and _escaped(line, end):
            end = line.find(b'"', end + 1)
        if end < 0:
            return
        yield start, end + 1
        start = line.find(b'"', end + 1)


def _escaped(line: bytes, at: int) -> bool:
    first = at
    while line[first - 1] == ord("\\"):
        first -= 1
    return bool((at - first) % 2)


def _string(line: bytes, start: int, end: int, where: str) -> bytearray:
    """The UTF-8 bytes of a JSON string, decoded part by part."""
    text_bytes, at, last = bytearray(), start + 1, end - 1
    while at < last:
        part = PART.match(line, at, last)
        stop = part.end() if part else last  # the parser refuses an illegal escape
        if stop < last and line[stop] & 0xC0 == 0x80:  # inside a character
            stop = max((i for i in range(stop - 3, stop) if line[i] & 0xC0 == 0xC0), default=stop)
        text_bytes += utf8(read_line(b'"' + line[at:stop] + b'"', where), where)
        at = stop
    return text_bytes  # no further copy: it may be long
