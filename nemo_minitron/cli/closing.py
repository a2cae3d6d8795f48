"""The last line of a command: what comes next, as a command that can be copied."""

from __future__ import annotations

import shlex
from pathlib import Path


def comes_next(*words: str | Path) -> None:
    """Prints the command of these words. A word in capitals stands for something that the user puts there."""
    print(f"next: minitron {' '.join(shlex.quote(str(word)) for word in words)}")


def beside(folder: Path, ending: str) -> Path:
    """The name of the next result: `out/student` and `distilled` -> `out/student-distilled`."""
    return folder.with_name(f"{folder.name}-{ending}")
