"""The one error that a user can cause: what was given, what is legal, the nearest legal value."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

# A disk that is full, or fails, while a command runs: nothing that the user gave is wrong.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


class InputError(ValueError):
    """Bad input from outside, told in one sentence; the command line prints it and exits with code 2."""


class DivergedError(RuntimeError):
    """A training whose loss, gradients or weights are no numbers any more; told in one sentence, exit code 1."""


def nearest(given: str, legal: Iterable[str]) -> str:
    """The end of a refusal: the legal name closest to `given`, or the list of them when none is close."""
    names = sorted(legal)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"legal are: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """What another library's error says, for the end of a sentence; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
