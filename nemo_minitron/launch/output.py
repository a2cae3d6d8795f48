"""What the processes of a stage print: to the log, lines of progress to the screen, and what says how they end."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_minitron.errors import visible
from nemo_minitron.settings.progress import PROGRESS

TAIL = 200  # lines of output that a message may come from
MARK = "  ~minitron "  # a line of a worker to its launcher: JSON behind it
_ERROR = re.compile(r"(\[rank\d+\]:\s*)?[\w.]*(Error|Exception|Interrupt)\b")
_REMARK = re.compile(r"\s|.*Warning:|\[W")  # a warning, the line behind it that it points to, one of torch's


@dataclasses.dataclass
class Rank:
    """A process of the stage: how far it is, and since when. `layers`: that its model has gone through."""

    pid: int = 0
    mark: Any = None
    layers: int = 0
    since: float = dataclasses.field(default_factory=time.monotonic)


class Output:
    """Reads a stage's output to its end whatever happens: processes whose pipe nobody reads hang for ever."""

    def __init__(self, log: Path | None) -> None:
        self.log, self.lost = log, ""  # `lost`: why something is not in the log
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self.failures: dict[int, str] = {}  # rank -> its error, in the order in which they came
        self.ranks: dict[int, Rank] = {}

    def read(self, stream: Iterable[str]) -> None:
        for line in stream:
            before, mark, message = line.partition(MARK)
            if mark and self._heard(message):
                line = before
            if not line:
                continue
            self._write(line)
            if line.startswith(PROGRESS):
                with contextlib.suppress(OSError, ValueError):  # nobody looks at the screen any more
                    print(visible(line[2:].rstrip("\n")), flush=True)
            self.tail.append(line)

    def _write(self, line: str) -> None:
        if self.log is None:
            return
        try:
            with open(self.log, "ab", buffering=0) as file:
                file.write(line.encode(errors="replace"))
        except OSError as error:
            self.lost = self.lost or f"its log '{self.log}' could not be written: {error.strerror}"

    def _heard(self, message: str) -> bool:
        """A worker's own line: how far it is, or what ended it."""
        try:
            said = json.loads(message)
            rank = int(said["rank"])
        except (ValueError, KeyError, TypeError):  # another process printed in the midst of it
            return False
        if "error" in said:
            self.failures[rank] = str(said["error"])
            return True
        known = self.ranks.setdefault(rank, Rank())
        if said["mark"] != known.mark:
            known.since = time.monotonic()
        known.pid, known.mark, known.layers = said["pid"], said["mark"], said["layers"]
        return True

    def cause(self) -> str:
        """Why they ended, as far as they say: the first rank's error, later ones are of ranks that it took along."""
        for rank, error in self.failures.items():
            return f"rank {rank}: {error}"
        errors = [line for line in self.tail if _ERROR.match(line)]
        words = [line for line in self.tail if line.strip() and not _REMARK.match(line)]
        return (errors[:1] or words[-1:] or ["it printed nothing"])[0].strip()


def tell(**message: object) -> None:
    """A worker's line to its launcher. One write, newline and all: other ranks print too."""
    with contextlib.suppress(OSError):
        os.write(1, f"{MARK}{json.dumps(message)}\n".encode())
