"""Reads what the processes of a stage print. It goes to the log, lines of progress also go to the screen, and workers'
own lines say how far they are and what ended them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path

from nemo_minitron.errors import visible
from nemo_minitron.progress import Bar, Work
from nemo_minitron.settings.progress import MARK, PROGRESS

TAIL = 200  # last lines of the output in which the cause of a failure is looked for
_ERROR = re.compile(r"(\[rank\d+\]:\s*)?[\w.]*(Error|Exception|Interrupt)\b")
_REMARK = re.compile(r"\s|.*Warning:|\[W")  # the indented line of code below a warning, a warning, torch's warning


@dataclasses.dataclass
class Rank:
    """A process of the stage. `mark` changes when it makes progress; `since`: when it last did (seconds of
    `time.monotonic`). `layers`: layers' forward passes that it has done."""

    pid: int = 0
    mark: object = None
    layers: int = 0
    since: float = dataclasses.field(default_factory=time.monotonic)


class Output:
    """The output of a stage's processes. It is read to its end even if the log cannot be written, because processes
    whose pipe nobody reads hang for ever."""

    def __init__(self, log: Path | None) -> None:
        self.log, self.lost = log, ""  # `lost`: why the log is not complete
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self.failures: dict[int, str] = {}  # rank -> its error, in the order in which they came
        self.ranks: dict[int, Rank] = {}
        self.bar = Bar()

    def read(self, stream: Iterable[str]) -> None:
        """Reads the lines of a stream until the processes close it. It runs in a thread."""
        for line in stream:
            before, mark, message = line.partition(MARK)
            if mark and self._take(message):  # another process's half line may stand before the mark
                line = before
            if not line:
                continue
            self._write(line)
            if line.startswith(PROGRESS):
                self._print(line)
            self.tail.append(line)

    def _print(self, line: str) -> None:
        """Prints a line of progress."""
        with contextlib.suppress(OSError, ValueError):  # the screen may be closed
            print(visible(line[2:].rstrip("\n")), flush=True)

    def _write(self, line: str) -> None:
        if self.log is None:
            return
        try:
            with open(self.log, "ab", buffering=0) as file:
                file.write(line.encode(errors="replace"))
        except OSError as error:
            self.lost = self.lost or f"its log '{self.log}' could not be written: {error.strerror}"

    def _take(self, message: str) -> bool:
        """Notes what a worker's line says: how far its work is, that it makes progress, or the error that ended it.
        False if it is not such a line."""
        try:
            report = json.loads(message)
            rank = int(report["rank"])
            work = Work(**report["work"]) if "work" in report else None
            text = f"{PROGRESS}{work.line()[2:]}\n" if work else ""
        except (ValueError, KeyError, TypeError):  # another process may have printed in the middle of the line
            return False
        if "error" in report:
            self.failures[rank] = str(report["error"])
            return True
        if work is not None:
            self._show(work, text if report.get("line") else "")
            return True
        known = self.ranks.setdefault(rank, Rank())
        if report["mark"] != known.mark:
            known.since = time.monotonic()
        known.pid, known.mark, known.layers = report["pid"], report["mark"], report["layers"]
        return True

    def _show(self, work: Work, line: str) -> None:
        """Shows how far the stage's work is. `line`: what the log has of it, and a screen without a bar; or nothing."""
        if line:
            self._write(line)
        with contextlib.suppress(OSError, ValueError):  # the screen may be closed
            drawn = self.bar.show(work)
            if line and (not drawn or work.done == work.total):  # the last line stays when the bar is gone
                self._print(line)

    def cause(self) -> str:
        """Why the processes ended, as far as they say. The first rank's error counts: it made the others fail."""
        for rank, error in self.failures.items():
            return f"rank {rank}: {error}"
        errors = [line for line in self.tail if _ERROR.match(line)]
        words = [line for line in self.tail if line.strip() and not _REMARK.match(line)]
        return (errors[:1] or words[-1:] or ["it printed nothing"])[0].strip()
