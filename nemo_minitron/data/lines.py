"""Lines of JSON and files of text, as bytes of UTF-8: read, or refused in one sentence that names the place."""

from __future__ import annotations

import codecs
import json
import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from nemo_minitron.errors import InputError

LONG = 1 << 20  # bytes from which a text is worked on in pieces: Python's own copies may take four times as much
PART = re.compile(
    rb"(?:[^\\]{1,4096}|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.){1,64}",
    re.DOTALL,
)
"""Up to 256 KiB of the inside of a JSON string that end between two characters; a pair of surrogates is one."""


class Document(NamedTuple):
    raw: bytes | bytearray  # UTF-8
    where: str  # it comes from: file and line, for a sentence


def read_line(line: bytes | str, where: str) -> Any:
    """The value of a line of JSON. Raises InputError for what is no JSON, and for JSON that Python cannot take."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: byte {error.start} does not decode") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise InputError(f"{where} cannot be read: it is nested too deeply") from None
    except ValueError as error:  # of a whole number with thousands of digits
        raise InputError(f"{where} cannot be read: {str(error).partition(';')[0]}") from None


def utf8(text: str, where: str) -> bytes:
    """A text's bytes. Raises InputError for half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds \\u{ord(text[error.start]):04x}, half of a surrogate pair, which is no character: "
            "mend the text, or leave such lines out with --skip-bad-lines"
        ) from None


def checked_utf8(raw: bytes, where: str) -> bytes:
    """`raw`, if it is UTF-8; else InputError says in which line it is not."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        for done in range(0, len(raw), LONG):
            decoder.decode(raw[done : done + LONG], final=done + LONG >= len(raw))
    except UnicodeDecodeError as error:
        kept = len(error.object) - len(raw[done : done + LONG])  # of the piece before
        at = done + error.start - kept
        line = raw.count(b"\n", 0, at) + 1
        raise InputError(f"{where}, line {line} is not UTF-8: byte {at} of the file does not decode") from None
    return raw


def long_line(line: bytes, where: str) -> tuple[Any, Callable[[str], bytearray | None]]:
    """A long line's value, in which a word stands for each long string, and the function from such a word to the
    string's bytes (None for another text). Python's parser would take several times the line's size.

    Raises InputError as `read_line`; the function as `utf8`.
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
    """Where the strings of a line of JSON begin and end, quotes included."""
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
    """The bytes of the text that a string of JSON spells, read part by part."""
    found, at, last = bytearray(), start + 1, end - 1
    while at < last:
        part = PART.match(line, at, last)
        stop = part.end() if part else last  # what is no escape, the parser refuses
        if stop < last and line[stop] & 0xC0 == 0x80:  # within a character
            stop = max((i for i in range(stop - 3, stop) if line[i] & 0xC0 == 0xC0), default=stop)
        found += utf8(read_line(b'"' + line[at:stop] + b'"', where), where)
        at = stop
    return found  # not copied once more: it may be long
