"""The table of `quality.py`: excess losses, and how they compare with Model Optimizer's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

import texts

PEER = "model optimizer"


def table(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each cut, arm and number of tokens: the excess loss of each text, and its ratio to Model Optimizer's.

    The excess is [mean, standard deviation over the seeds]; the difference to the peer's loss is [mean, error], of
    pairs of seeds, or, of one measurement, of the held-out rows.
    """
    teacher = next((row for row in rows if row["arm"] == "teacher"), None)
    for cut, arm, tokens in dict.fromkeys((row["cut"], row["arm"], row["tokens"]) for row in rows):
        if teacher is None or arm == "teacher":
            continue
        own, peer = ({row["seed"]: row for row in rows if (row["cut"], row["arm"], row["tokens"]) == (cut, a, tokens)}
                     for a in (arm, PEER))  # fmt: skip
        line: dict[str, Any] = {"cut": cut, "arm": arm, "tokens": tokens, "seeds": len(own)}
        yield line | {name: _compared(name, own, peer, teacher) for name in texts.TEXTS}


def _compared(name: str, own: dict[int, Any], peer: dict[int, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    excess = [row[name] - teacher[name] for row in own.values()]
    numbers: dict[str, Any] = {"excess": round(statistics.fmean(excess), 4)}
    common_seeds = [seed for seed in own if seed in peer and own[seed]["arm"] != PEER]
    if common_seeds:
        theirs = statistics.fmean(peer[seed][name] - teacher[name] for seed in common_seeds)
        mine = statistics.fmean(own[seed][name] - teacher[name] for seed in common_seeds)
        numbers["ratio"] = round(mine / theirs, 3)
        numbers["difference"] = _difference(name, own, peer, common_seeds)
    return numbers


def _difference(name: str, own: dict[int, Any], peer: dict[int, Any], seeds: list[int]) -> list[float]:
    of_rows = [[a - b for a, b in zip(own[s]["loss of each row"][name], peer[s]["loss of each row"][name], strict=True)]
               for s in seeds]  # fmt: skip
    means = [statistics.fmean(pairs) for pairs in of_rows]
    one = len(seeds) == 1
    error = statistics.stdev(of_rows[0]) / math.sqrt(len(of_rows[0])) if one else statistics.stdev(means)
    return [round(statistics.fmean(means), 4), round(error, 4)]


def show(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'cut':14}{'arm':18}{'tokens':>8}{'seeds':>6}" + "".join(f"{name:>32}" for name in texts.TEXTS))
    for row in table(rows):
        line = f"{row['cut']:14}{row['arm']:18}{row['tokens']:>8,}{row['seeds']:>6}"
        for name in texts.TEXTS:
            numbers, more = row[name], ""
            if "ratio" in numbers:
                more = "{:>6.2f} {:>+8.3f} ({:.3f})".format(numbers["ratio"], *numbers["difference"])
            line += f"{numbers['excess']:>9.3f}{more:>23}"
        print(line)
