"""Compares plain cuts of SmolLM2-135M with compensated ones, as cut and after equal short distillation, three seeds:
`nice -n 19 python benchmarks/compensation.py [--work runs/compensation] [--distill 8192] [--report]`.

One calibration, on Wikipedia, scores the model and gives the Gram matrices; it uses none of the measured rows. Losses
on held-out Wikipedia, which is also what the students learn, and on another kind of text, the Python reference manual
(Python's own `pydoc_data.topics`). Scores, plans and compensations are made by `minitron` commands and lie in `--work`;
students are trained with the package's step and Megatron's optimizer, but in one process and without a trainer, as in
`retraining.py`. A seed draws the rows, which are the same for every arm. Arms that are not part of the question are
measured only as cut. Each finished measurement is a line of `--work`/state.jsonl, so the script resumes when it runs
again; `--report` runs nothing. Prints a table, and writes `--out`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
from retraining_state import Lines, spread
from short_training import Schedule, Training, held_out_loss

TRAIN, TEST = common.ROOT / "demo/wikipedia/train.jsonl", common.ROOT / "demo/wikipedia/test.jsonl"
ROWS = {"samples": 48, "sequence-length": 512, "batch-size": 4}  # 24,576 tokens
HELD_OUT = 512  # the length of a held-out row
SEEDS = (1, 2, 3)
CORPORA = ("wikipedia", "python manual")
KEEP = {
    "mild width": "ffn=1280",
    "heavy width": "ffn=1024",
    "heads": "heads=6",
    "width and heads": "ffn=1280,heads=6",
    "hidden": "hidden=512",
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A cut, and what replaces its slices. `distilled`: the student is also trained, with each seed."""

    cut: str
    how: str = "plain"
    solved: bool = False
    fold_norms: bool = False
    residual: str | None = None
    distilled: bool = False


def _pair(cut: str, *, distilled: bool) -> tuple[Arm, Arm]:
    return Arm(cut, distilled=distilled), Arm(cut, "compensated", solved=True, distilled=distilled)


ARMS = (
    *_pair("mild width", distilled=True),
    *_pair("heavy width", distilled=True),
    *_pair("heads", distilled=True),
    Arm("heads", "residual", residual="paper"),
    Arm("heads", "residual, other sign", residual="laco"),
    *_pair("width and heads", distilled=False),
    Arm("hidden", distilled=True),
    Arm("hidden", "folded norms", fold_norms=True, distilled=True),
)
Key = tuple[str, str, int]  # cut, how, seed; seed 0: as cut


def minitron(*arguments: object) -> None:
    command = [sys.executable, "-m", "nemo_minitron.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"minitron {' '.join(map(str, arguments))}\n{done.stderr[-3000:]}")


class State(Lines):
    """A line for each finished measurement of the seeds."""

    def __init__(
        self, work: Path, settings: dict[str, Any], seeds: int = len(SEEDS), cuts: Sequence[str] = tuple(KEEP)
    ) -> None:
        super().__init__(work, settings)
        self.seeds, self.cuts = SEEDS[:seeds], cuts

    def left(self) -> list[tuple[Arm, int]]:
        """The measurements that are left: the arms of the question as cut and then seed by seed, and the others as
        cut."""
        arms = [arm for arm in ARMS if arm.cut in self.cuts]
        question = [arm for arm in arms if arm.distilled]
        others = [(arm, 0) for arm in arms if not arm.distilled]
        wanted = [*((arm, seed) for seed in (0, *self.seeds) for arm in question), *others]
        return [(arm, seed) for arm, seed in wanted if not self.has(arm, seed)]

    def has(self, arm: Arm, seed: int) -> bool:
        return (arm.cut, arm.how, seed) in {key_of(row) for row in self.rows}


def key_of(row: dict[str, Any]) -> Key:
    return row["cut"], row["how"], row["seed"]


class Bench:
    """The files, texts and teacher that all arms share; each is made once."""

    def __init__(self, model: str, work: Path, settings: dict[str, Any]) -> None:
        import nemo_minitron.backend as backend
        from nemo_minitron.data import Tokens, build, load_tokenizer

        backend.setup()
        self.model, self.work, self.settings = model, work, settings
        manual, tokenizer = work / "manual.jsonl", load_tokenizer(model)
        write_manual(manual)
        texts = {"train": TRAIN, **dict(zip(CORPORA, (TEST, manual), strict=True))}
        self.tokens: dict[str, Tokens] = {
            name: build(str(text), tokenizer, work / f"{name} tokens") for name, text in texts.items()
        }
        self.scores = work / "scores.safetensors"
        if not self.scores.exists():
            minitron("estimate", model, "--data", TRAIN, *flat(ROWS), "--out", self.scores)

    def teacher(self, state: State) -> Any:
        """The teacher, measured before it loses its head to the step."""
        from nemo_minitron.distillation.teacher import Teacher
        from nemo_minitron.hosts.nemo.distill import model_inputs
        from nemo_minitron.hosts.nemo.models import load_model

        chunk = load_model(self.model, precision="bf16")[0]
        self.vocab_size = chunk.vocab_size
        if not state.has(Arm("none"), 0):
            state.add({"cut": "none", "how": "plain", "seed": 0, **self.losses(chunk)})
        return Teacher([chunk], model_inputs)

    def run(self, state: State) -> None:
        teacher = self.teacher(state)
        for arm, seed in state.left():
            student = self.student(arm)
            timing = {"CPU s a step": self.train(student, teacher, seed)} if seed else {}
            state.add({"cut": arm.cut, "how": arm.how, "seed": seed, **self.losses(student), **timing})
            print(json.dumps(state.rows[-1]), flush=True)
            del student
            gc.collect()  # Megatron's DDP and its optimizer hold each other: 0.7 GB an arm

    def student(self, arm: Arm) -> Any:
        from nemo_minitron.artifacts import PrunePlan
        from nemo_minitron.commands.prune import Extras, compensation_of
        from nemo_minitron.hosts.nemo.models import load_model
        from nemo_minitron.sources.open import open_source

        file = self.work / f"{arm.cut}.json"
        if not file.exists():
            minitron("plan", self.scores, "--keep", KEEP[arm.cut], "--out", file)
        solved, scores = self.solved(file) if arm.solved else None, self.scores if arm.residual else None
        plan, extras = PrunePlan.load(file), Extras(solved, arm.fold_norms, arm.residual, scores)
        compensation = compensation_of(open_source(self.model), plan, extras)
        return load_model(self.model, plan, compensation=compensation, precision="bf16")[0]

    def solved(self, plan: Path) -> Path:
        out, ridge = plan.with_suffix(".safetensors"), self.settings["ridge"]
        if not out.exists():
            start = time.perf_counter()
            minitron("compensate", self.model, plan, "--data", TRAIN, *flat(ROWS), "--ridge", ridge, "--out", out)
            print(f"{plan.stem}: compensated in {time.perf_counter() - start:.0f} s", flush=True)
        return out

    def train(self, student: Any, teacher: Any, seed: int) -> float:
        """Trains the student in place; returns the median CPU seconds of a step."""
        from nemo_minitron.distillation.step import Objective, distillation_step
        from nemo_minitron.hosts.nemo.distill import model_inputs

        length = self.settings["sequence length"]
        rows = self.tokens["train"].windows(length + 1, self.settings["distillation tokens"] // length, seed)
        step = distillation_step(Objective(self.vocab_size, logits_weight=1.0), model_inputs, teacher)
        return Training(student, len(rows), Schedule()).run(step, rows)["CPU s a step"]

    def losses(self, chunk: Any) -> dict[str, Any]:
        """{"parameters": number, corpus: nats a token, ...}."""
        count = self.settings["held-out tokens"] // HELD_OUT
        numbers = {
            corpus: round(held_out_loss(chunk, self.tokens[corpus].windows(HELD_OUT + 1, count), self.vocab_size), 4)
            for corpus in CORPORA
        }
        return {"parameters": sum(p.numel() for p in chunk.parameters()), **numbers}


def flat(options: dict[str, int]) -> list[object]:
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def write_manual(file: Path) -> None:
    from pydoc_data.topics import topics

    file.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)))


def summary(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each arm, as cut and distilled: perplexities, and the difference of its loss from that of the plain cut.

    A difference is [mean, standard deviation over the seeds] of pairs with the same seed, nats a token.
    """
    by_key = {key_of(row): row for row in rows}
    for arm in (Arm("none"), *ARMS):
        for stage, seeds in (("as cut", (0,)), ("distilled", SEEDS)):
            of_arm = [by_key[arm.cut, arm.how, seed] for seed in seeds if (arm.cut, arm.how, seed) in by_key]
            if of_arm:
                facts = {"cut": arm.cut, "how": arm.how, "stage": stage, "seeds": len(of_arm)}
                yield facts | {"parameters": of_arm[0]["parameters"], **of_corpora(of_arm, by_key)}


def of_corpora(own: list[dict[str, Any]], found: dict[Key, dict[str, Any]]) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for corpus in CORPORA:
        plain = {row["seed"]: found.get((row["cut"], "plain", row["seed"])) for row in own}
        pairs = [row[corpus] - base[corpus] for row in own if (base := plain[row["seed"]]) and base is not row]
        mean = sum(row[corpus] for row in own) / len(own)
        numbers[corpus] = {"perplexity": round(math.exp(mean), 2), "loss - plain's": spread(pairs)}
    return numbers


def show(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'cut':17}{'how':22}{'stage':11}{'seeds':>6}{'parameters':>13}" + "".join(f"{c:>28}" for c in CORPORA))
    for row in rows:
        line = f"{row['cut']:17}{row['how']:22}{row['stage']:11}{row['seeds']:>6}{row['parameters']:>13,}"
        for corpus in CORPORA:
            difference = row[corpus]["loss - plain's"]
            line += f"{row[corpus]['perplexity']:>10,.2f}"
            form = "{:>+9.4f} ({:.4f})" if row["seeds"] > 1 else "{:>+9.4f}         "
            line += form.format(*difference) if difference else " " * 18
        print(line)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default=str(common.ROOT / "demo/smollm2-135m-instruct"))
    parser.add_argument("--work", type=Path, default=common.ROOT / "runs/compensation")
    parser.add_argument("--tokens", type=int, default=4096, help="of each held-out corpus")
    parser.add_argument("--distill", type=int, default=8192, help="tokens that a student is trained on")
    parser.add_argument("--sequence-length", type=int, default=256, help="of the distillation")
    parser.add_argument("--ridge", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(len(SEEDS) + 1), help="0: as cut alone")
    parser.add_argument("--cuts", nargs="+", default=list(KEEP), choices=list(KEEP), help="measure only these cuts")
    parser.add_argument("--report", action="store_true", help="run nothing more")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    settings = {
        "model": Path(options.model).name, "calibration": {"text": "wikipedia, train", **ROWS},
        "ridge": options.ridge, "distillation tokens": options.distill, "sequence length": options.sequence_length,
        "schedule": dataclasses.asdict(Schedule()), "held-out tokens": options.tokens, "precision": "bf16",
        "threads": 1,
    }  # fmt: skip
    state, head = (
        State(options.work, settings, options.seeds, options.cuts),
        common.heading(("torch", "numpy", "megatron-core")),
    )
    if not options.report:
        run(options.model, options.work, settings, state)
    rows = list(summary(state.rows))
    show(rows)
    result = {
        **head, "settings": settings, "summary": rows,
        "not run": [f"{arm.cut}, {arm.how}, seed {seed}" for arm, seed in state.left()], "rows": state.rows,
    }  # fmt: skip
    common.write(result, options.out)


def run(model: str, work: Path, settings: dict[str, Any], state: State) -> None:
    import torch

    torch.set_num_threads(settings["threads"])
    Bench(model, work, settings).run(state)


if __name__ == "__main__":
    main()
