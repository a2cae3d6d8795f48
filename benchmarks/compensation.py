"""Plain cuts against compensated ones on a real model, in one run, before and after equal short distillation:
`python benchmarks/compensation.py [--model demo/smollm2-135m-instruct] [--work runs/compensation] [--distill 0]`.

One calibration, on Wikipedia, scores the model and gives the Gram matrices; its rows are none of those measured.
Perplexity on held-out Wikipedia and on another kind of text, the Python reference manual (Python's own
`pydoc_data.topics`). Each step is a `minitron` command and leaves a file in `--work`: run again after a kill, the
script goes on. `--distill N` also trains every student on N tokens, and measures again. Prints a table and writes
`benchmarks/results/DATE_compensation.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

HOME = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
TRAIN, TEST = HOME / "demo/wikipedia/train.jsonl", HOME / "demo/wikipedia/test.jsonl"
ROWS = {"--samples": 48, "--sequence-length": 512, "--batch-size": 4}  # 24,576 tokens
CUTS = {
    "mild width": "ffn=1280",
    "heavy width": "ffn=1024",
    "heads": "heads=6",
    "width and heads": "ffn=1280,heads=6",
    "hidden": "hidden=512",
}
EXTRAS: dict[str, dict[str, Sequence[str]]] = {  # how else a cut is made; COMPENSATION stands for its file
    "mild width": {"compensated": ["--compensation", "COMPENSATION"]},
    "heavy width": {"compensated": ["--compensation", "COMPENSATION"]},
    "heads": {
        "compensated": ["--compensation", "COMPENSATION"],
        "residual": ["--head-residual", "paper", "--scores", "SCORES"],
        "residual, other sign": ["--head-residual", "laco", "--scores", "SCORES"],
    },
    "width and heads": {"compensated": ["--compensation", "COMPENSATION"]},
    "hidden": {"folded norms": ["--fold-norms"]},
}


def minitron(*arguments: object) -> str:
    command = [sys.executable, "-m", "nemo_minitron.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"minitron {' '.join(map(str, arguments))}\n{done.stderr[-3000:]}")
    return done.stdout


class Bench:
    """The steps, each done once: what is in `work` is not done again."""

    def __init__(self, model: str, work: Path, tokens: int, distill: int, ridge: float) -> None:
        self.model, self.work, self.tokens, self.distill, self.ridge = model, work, tokens, distill, ridge
        work.mkdir(parents=True, exist_ok=True)
        self.scores = work / "scores.safetensors"
        self.corpora = {"wikipedia": TEST, "python manual": work / "manual.jsonl"}
        write_manual(self.corpora["python manual"])

    def run(self) -> list[dict[str, Any]]:
        if not self.scores.exists():
            rows = [part for option in ROWS.items() for part in option]
            minitron("estimate", self.model, "--data", TRAIN, *rows, "--out", self.scores)
        found = [{"cut": "none", "how": "teacher", **self.measured(Path(self.model), "teacher")}]
        for cut, keep in CUTS.items():
            plan = self.work / f"{cut}.json"
            if not plan.exists():
                minitron("plan", self.scores, "--keep", keep, "--out", plan)
            for how, options in {"plain": (), **EXTRAS[cut]}.items():
                row = {"cut": cut, "keep": keep, "how": how}
                found.append(row | self.student(plan, f"{cut}, {how}", options))
                print(json.dumps(found[-1]), flush=True)
        return found

    def student(self, plan: Path, name: str, options: Sequence[str]) -> dict[str, Any]:
        out = self.work / name
        if not out.exists():
            minitron("prune", self.model, plan, out, *[self.file(plan, option) for option in options])
        numbers = self.measured(out, name)
        if self.distill:
            trained = self.work / f"{name}, distilled"
            settings = ["--tokens", self.distill, "--sequence-length", 512, "--learning-rate", 3e-4]
            minitron("distill", out, "--teacher", self.model, "--data", TRAIN, *settings, "--out", trained)
            numbers["distilled"] = self.measured(trained, f"{name}, distilled")
        return numbers

    def file(self, plan: Path, option: str) -> str | Path:
        """An option of `prune`, with the files that it names; a compensation is solved when it is first needed."""
        if option != "COMPENSATION":
            return self.scores if option == "SCORES" else option
        out = plan.with_suffix(".safetensors")
        if not out.exists():
            rows = [part for row in ROWS.items() for part in row]
            start = time.perf_counter()
            minitron("compensate", self.model, plan, "--data", TRAIN, *rows, "--ridge", self.ridge, "--out", out)
            print(f"{plan.stem}: compensated in {time.perf_counter() - start:.0f} s", flush=True)
        return out

    def measured(self, folder: Path, name: str) -> dict[str, Any]:
        """{"parameters", and of each corpus its perplexity}."""
        found: dict[str, Any] = {}
        for corpus, text in self.corpora.items():
            file = self.work / f"{name}, {corpus}.json"
            if not file.exists():
                numbers = minitron("evaluate", folder, "--data", text, "--tokens", self.tokens, "--json")
                file.write_text(numbers.splitlines()[-1])
            numbers = json.loads(file.read_text())
            found |= {"parameters": numbers["parameters"], corpus: round(numbers["perplexity"], 3)}
        return found


def write_manual(file: Path) -> None:
    from pydoc_data.topics import topics

    file.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)))


def show(rows: list[dict[str, Any]]) -> None:
    corpora = ("wikipedia", "python manual")
    print(f"\n{'cut':18}{'how':22}{'parameters':>13}" + "".join(f"{name:>16}" for name in corpora))
    for row in rows:
        for stage in (row, row.get("distilled")):
            if stage:
                how = row["how"] if stage is row else f"{row['how']}, distilled"
                numbers = "".join(f"{stage[name]:>16,.2f}" for name in corpora)
                print(f"{row['cut']:18}{how:22}{row['parameters']:>13,}{numbers}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HOME / "demo/smollm2-135m-instruct"))
    parser.add_argument("--work", type=Path, default=HOME / "runs/compensation")
    parser.add_argument("--tokens", type=int, default=16_384, help="of each held-out corpus")
    parser.add_argument("--distill", type=int, default=0, help="tokens that every student is trained on")
    parser.add_argument("--ridge", type=float, default=0.01)
    arguments = parser.parse_args()
    settings = (arguments.tokens, arguments.distill, arguments.ridge)
    rows = Bench(arguments.model, arguments.work, *settings).run()
    show(rows)
    result = {
        "command": " ".join(["python benchmarks/compensation.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": common.machine(("torch", "numpy", "megatron-core")),
        "calibration": {name.removeprefix("--"): value for name, value in ROWS.items()} | {"text": "wikipedia, train"},
        "held-out tokens": arguments.tokens, "distillation tokens": arguments.distill, "ridge": arguments.ridge,
        "perplexity": rows,
    }  # fmt: skip
    out = RESULTS / f"{result['date']}_compensation.json"
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
