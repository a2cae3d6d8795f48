"""Records a finished run of `minitron compress` as a dated result: `python benchmarks/record.py runs/demo`.

Prints the table and writes `benchmarks/results/DATE_RECIPE.json` (on Megatron-Bridge `DATE_RECIPE_bridge.json`):
numbers, seconds of each stage, versions, the machine, and the command that makes the run again.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from pathlib import Path

from common import dated, write


def record(run: Path) -> Path:
    """Reads `run`'s recipe, manifest and numbers; returns the file written."""
    files = ("recipe", "manifest", "numbers")
    recipe, manifest, numbers = (json.loads((run / f"{name}.json").read_text()) for name in files)
    result = {
        "command": f"minitron compress {recipe['name']}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
        "seeds": {"calibration": recipe["calibration"]["seed"], "distillation": recipe["distillation"]["seed"]},
        "numbers": numbers,
        "stages": manifest["stages"],
        "versions": manifest["versions"],
    }
    for row in numbers:
        print(f"{row['stage']:10}{row['parameters']:>13,}{row['perplexity']:>12,.2f}{row['tokens']:>9,} tokens")
    for stage in manifest["stages"]:
        print(f"{stage['name']:18}{stage['seconds']:>8.1f} s")
    on_bridge = manifest["versions"].get("host") == "bridge"
    write(result, out := dated(recipe["name"] + "_bridge" * on_bridge))
    return out


if __name__ == "__main__":
    print(record(Path(sys.argv[1])))
