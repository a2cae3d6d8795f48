"""Readers of the small files of a run folder: numbers, samples, losses, the last checkpoint, candidates of a search.

Each reader raises InputError if the file is missing, is damaged, or holds an impossible value.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.artifacts.files import read_json
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.parse import SHA256, Kind, flag, grouped, listed, mapped, maybe, number, shown, text, whole
from nemo_minitron.errors import InputError


def loss(value: object) -> float:
    """A number, or the infinity of a training that diverged."""
    return value if value == float("inf") else number()(value)


NAME = text(re.compile(r"(?!\.)[^/\\\0-\x1f]{1,200}"), "a folder's name")
DIGEST = text(SHA256, "a sha256")
INSIDE = text(re.compile(r"(?!\.\.?(/|$))[^/\0]+(/(?!\.\.?(/|$))[^/\0]+)*"), "a path inside its folder")
PATH = text(re.compile(r"[^\0]+"), "a path")

NUMBERS = listed(grouped({"stage": text(), "corpus": text(), "bits_per_byte": maybe(number()), "seconds": number(0),
    "tokens": whole(), "parameters": whole(), "loss": number(), "perplexity": number()}, {
    "loss_error": maybe(number(0)), "gap": number(), "gap_error": maybe(number(0)), "agreement": number(0),
    "agreement_error": maybe(number(0))}))  # fmt: skip
SPEED = mapped(grouped({"latency": number(0), "tokens_per_second": number(0), "prompt": whole(), "new": whole(),
    "precision": text(), "device": text(), "in_turn": flag}))  # fmt: skip
BENCHMARKS = mapped(mapped(mapped(number())))
SAMPLES = listed(grouped({"stage": text(), "prompt": text(), "text": text()}))
LAST = grouped({"checkpoint": INSIDE}, {"stopped": whole()})
MARGINALS = grouped({"uncut": number(), "cuts": listed(grouped({"axis": NAME, "size": whole(1), "loss": number()}))})
CANDIDATES = listed(grouped({"name": NAME, "parameters": whole()}), least=1)
MEASURED = listed(grouped({"name": NAME, "parameters": number(0), "loss": number()}), least=1)
RANKS = listed(grouped({"step": whole(), "candidate": NAME, "loss": loss, "rank": whole(1)}), least=1)
CORPORA = grouped({"train": PATH, "test": PATH, "calibration": PATH})
MARKS = mapped(text())
MEASURED_TEXT = {"text": text(), "loss": number(), "loss_error": maybe(number(0)), "losses": listed(number(), least=1)}
MARK = {"step": whole(), "tokens": whole()}
TRAJECTORY = grouped({"identity": text(), "teacher": listed(grouped(MEASURED_TEXT)), "rows": listed(
    grouped({**MARK, **MEASURED_TEXT})), "tasks": listed(grouped({**MARK, "task": text(), "metric": text(),
    "value": number(), "error": maybe(number(0))}))})  # fmt: skip
GATES = grouped({"plan": text(), "rows": whole(1), "sequence_length": whole(1), "precision": text(), "gates": listed(
    grouped({"name": text(), "state": text(), "note": text(), "figure": maybe(number()), "limit": maybe(number(0)),
    "error": maybe(number(0))}))})  # fmt: skip


def read_numbers(path: str | Path) -> list[JsonObject]:
    """Reads numbers.json: one row for each evaluated model and text."""
    return read_json(path, "the numbers", NUMBERS)


def read_samples(path: str | Path) -> list[JsonObject]:
    """Reads samples.json: the text that each model wrote after a prompt."""
    return read_json(path, "the samples", SAMPLES)


def read_last(path: str | Path) -> JsonObject:
    """Reads last.json of a training: `checkpoint`, relative to its folder; `stopped`, a step, if the training ended
    early."""
    return read_json(path, "the record of the last checkpoint", LAST)


def read_mark(path: str | Path) -> str:
    """Reads the digest of the settings that a training was started with."""
    return read_json(path, "the mark of the training's settings", DIGEST)


def read_known(path: Path, identity: str, **fields: Kind) -> JsonObject | None:
    """The content of a candidate's file; None if it is missing, or was made with another `identity`."""
    if not path.is_file():
        return None
    content = read_json(path, "a candidate's file", grouped({"identity": text(), **fields}))
    return content if content["identity"] == identity else None


def read_curve(path: str | Path, columns: Sequence[str]) -> list[dict[str, float]]:
    """The rows of loss.csv as numbers; a loss may be infinite or NaN if the training went wrong."""
    rows = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for line, row in enumerate(csv.DictReader(file), 2):
                rows.append({name: _cell(row.get(name), name, line) for name in columns})
        return rows
    except FileNotFoundError:
        raise InputError(f"the loss curve '{path}' does not exist") from None
    except (ValueError, csv.Error) as error:
        raise InputError(f"'{path}' is no loss curve of columns {', '.join(columns)} ({error})") from None


def _cell(cell: object, name: str, line: int) -> float:
    value = float(cell) if isinstance(cell, str) else None
    if value is None or (name != "loss" and not -1e300 < value < 1e300):
        raise ValueError(f"line {line}: '{name}' is {shown(cell)}")
    return value
