"""Runs SmolLM2 from a budget to the report, and measures the worth of the search:
`python benchmarks/search.py [key=value ...]`.

Runs `minitron compress smollm2_135m_to_84m_search` (into `--out`; a new folder, or one of a run to resume) and
writes `benchmarks/results/DATE_search.json`: each candidate's sizes, proxy, loss before retraining and fate; how
well the proxy orders the losses (Spearman's rank correlation); the ranks over steps; seconds of each stage.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import dated, heading, parser, write

RECIPE = "smollm2_135m_to_84m_search"


def spearman(a: list[float], b: list[float]) -> float:
    """Correlation of ranks; of ties the earlier comes first."""
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def collect(run: Path) -> dict[str, Any]:
    """The results of a finished run's search."""
    names = ("search/measured", "search/ranks", "numbers", "manifest", "recipe")
    measured, ranks, numbers, manifest, recipe = (json.loads((run / f"{name}.json").read_text()) for name in names)
    last = {row["candidate"]: row["step"] for row in ranks}
    proxy, loss = [row["kept"] for row in measured], [row["loss"] for row in measured]
    return {
        "budget": {name: value for name, value in recipe["search"].items() if value},
        "candidates": [{**row, "distilled to step": last.get(row["name"], 0)} for row in measured],
        "proxy against loss, Spearman": round(spearman(proxy, [-value for value in loss]), 3),
        "ranks": ranks,
        "winner": max(ranks, key=lambda row: (row["step"], -row["rank"]))["candidate"],
        "numbers": numbers,
        "stages": manifest["stages"],
        "seconds": round(sum(stage["seconds"] for stage in manifest["stages"]), 1),
    }


def show(result: dict[str, Any]) -> None:
    print(f"{'candidate':32}{'parameters':>14}{'kept':>8}{'loss':>8}{'distilled to':>14}")
    for row in result["candidates"]:
        print(
            f"{row['name']:32}{row['parameters']:>14,}{row['kept']:>8.3f}{row['loss']:>8.3f}"
            f"{row['distilled to step']:>14}"
        )
    print(f"proxy against loss, Spearman: {result['proxy against loss, Spearman']}; the winner: {result['winner']}")
    for stage in result["stages"]:
        print(f"{stage['name']:18}{stage['seconds']:>8.1f} s")
    print(f"{'together':18}{result['seconds']:>8.1f} s")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--out", type=Path, default=Path("runs/search"))
    options.add_argument("overrides", nargs="*", help="overrides, as for minitron compress")
    given = options.parse_args()
    result = heading(["torch", "megatron-core", "nemo_toolkit"])
    command = [sys.executable, "-m", "nemo_minitron.cli", "compress", RECIPE, *given.overrides, "--out", str(given.out)]
    subprocess.run(command, check=True)
    result |= collect(given.out)
    show(result)
    write(result, out := dated("search"))
    print(out)


if __name__ == "__main__":
    main()
