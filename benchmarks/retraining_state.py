"""The finished measurements, one line each in a file, and their summary."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from retraining_arms import ARMS, QUESTIONS, SEEDS, Arm


class Lines:
    """`work`/state.jsonl: the settings, then a line for each finished measurement; `given`: an older result, whose
    settings and rows it starts with."""

    def __init__(self, work: Path, settings: dict[str, Any], given: dict[str, Any] | None = None) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.file = work / "state.jsonl"
        if not self.file.exists():
            lines = [given["settings"], *given["rows"]] if given else [settings]
            self.file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        first, *self.rows = map(json.loads, self.file.read_text().splitlines())
        if first != settings:
            raise SystemExit(f"{self.file} was started with {first}, not {settings}; give another --work")

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


class State(Lines):
    """A line for each finished arm and seed; `old`: the file of an older result, whose rows it starts with."""

    def __init__(self, work: Path, settings: dict[str, Any], old: Path | None) -> None:
        super().__init__(work, settings, json.loads(old.read_text()) if old else None)

    def left(self) -> list[tuple[Arm, int]]:
        done = {(row["arm"], row["seed"]) for row in self.rows}
        return [(arm, seed) for arm in ARMS for seed in SEEDS if (arm.name, seed) not in done]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each arm that has run: perplexities, and mean and spread of the loss and of its difference from the base's
    loss."""
    table = []
    after = {(row["arm"], row["seed"]): row["after"] for row in rows}
    for arm in sorted(ARMS, key=lambda arm: QUESTIONS.index(arm.question)):
        of_arm = [row for row in rows if row["arm"] == arm.name]
        if of_arm:
            pairs = [row["after"] - after[arm.base, row["seed"]] for row in of_arm if (arm.base, row["seed"]) in after]
            table.append({
                "question": arm.question, "arm": arm.name, "seeds": len(of_arm), "parameters": of_arm[0]["parameters"],
                "tokens": of_arm[0]["tokens"], "CPU s a step": statistics.median(row["CPU s a step"] for row in of_arm),
                "perplexity before": round(math.exp(statistics.fmean(row["before"] for row in of_arm)), 2),
                "perplexity": round(math.exp(statistics.fmean(row["after"] for row in of_arm)), 2),
                "loss": spread([row["after"] for row in of_arm]), "base": arm.base, "loss - base's": spread(pairs),
            })  # fmt: skip
    return table


def spread(values: list[float]) -> list[float] | None:
    """[mean, standard deviation over the seeds]; None without values."""
    if not values:
        return None
    return [round(x, 4) for x in (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)]


def show(rows: list[dict[str, Any]], left: list[tuple[Arm, int]]) -> None:
    """Prints one line an arm. Spread: the standard deviation over seeds; the last column compares pairs with the same
    seed."""
    print(f"{'arm':27}{'seeds':>6}{'parameters':>13}{'tokens':>8}{'s/step':>8}{'before':>9}{'after':>8}"
          f"{'loss (spread)':>18}{'loss - base (spread)':>23}  base")  # fmt: skip
    question = ""
    for row in rows:
        if row["question"] != question:
            question = row["question"]
            print(f"{question}:")
        both = ["{:.4f} ({:.4f})".format(*row[key]) if row[key] else "" for key in ("loss", "loss - base's")]
        print(f"  {row['arm']:25}{row['seeds']:>6}{row['parameters']:>13,}{row['tokens']:>8,}"
              f"{row['CPU s a step']:>8.2f}{row['perplexity before']:>9.2f}{row['perplexity']:>8.2f}{both[0]:>18}"
              f"{both[1]:>23}  {row['base']}")  # fmt: skip
    if left:
        print("not run: " + ", ".join(f"{arm.name} {seed}" for arm, seed in left))
