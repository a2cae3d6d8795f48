"""The one error that a user can cause: what was given, what is legal, the nearest legal value."""

from __future__ import annotations

import difflib
import errno
import unicodedata
from collections.abc import Iterable

# The disk is full, or fails, while a command runs; the user's input is not at fault.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
LONGEST = 1500  # most characters of a message
JOINERS = "\u200c\u200d"  # scripts and emoji need these format characters


class InputError(ValueError):
    """Bad input from outside, told in one sentence; the command line prints it and exits with code 2.

    A sentence may quote a file. So characters that a terminal would act on are printed as escapes, and the middle of a
    very long sentence is left out.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return visible(text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}")


def unprintable(character: str) -> bool:
    """Whether a terminal would not show the character but act on it: control characters, bidirectional marks, line
    separators, lone surrogates."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in JOINERS


def visible(text: str) -> str:
    """`text` with an escape in place of each unprintable character."""
    if text.isprintable():
        return text
    return "".join(_escaped(character) if unprintable(character) else character for character in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


class DivergedError(RuntimeError):
    """A training whose loss, gradients or weights are no longer finite; one sentence, exit code 1."""


class GateError(RuntimeError):
    """A gate of a job that did not open: the cut is wrong, so nothing is trained; one sentence, exit code 1."""


def nearest(given: str, legal: Iterable[str]) -> str:
    """The end of a refusal: the legal name closest to `given`, or the list of all legal names if none is close."""
    names = sorted(legal)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"legal are: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """The first line of another library's error, for the end of a sentence; the error's type if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
