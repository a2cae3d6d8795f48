"""Compares ways to retrain a cut SmolLM2-135M on little text, with three seeds each:
`nice python benchmarks/retraining.py`.

`retraining_arms.py` lists the arms. Each is a cut of the teacher, trained on `--tokens` tokens of demo/wikipedia (or of
Python's own manual, the shifted domain) and measured on held-out text of the same corpus, with the package's step and
Megatron's optimizer, but in one process and without a trainer. A seed draws the rows, the same for every arm. "Equal
time" is of CPU seconds a step, the teacher's forward and the optimizer with them, where the losses take turns in one
process. Each finished arm and seed is a line of `--work`/state.jsonl, so the script resumes when it runs again;
`--resume RESULT.json` starts the state with the rows of an older result. `--report` runs nothing. Prints a table, and
writes `--out`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
from retraining_arms import CUTS, HALFWAY, MANUAL, WIKIPEDIA, Arm
from retraining_state import State, show, summary
from short_training import Schedule, Training, held_out_loss

KNOWN, PACE = "known.json", "pace.json"
TURNS = 8  # turns of each loss; the first is not counted
CALIBRATION, HELD_OUT = 32, 512  # number of rows that are scored; length of a held-out row
WEIGHTS = {"kl": (1.0, 0.0), "lm": (0.0, 1.0), "both": (1.0, 1.0)}  # of logits and labels
EVERY = 12  # each twelfth topic of the manual is held out


class Bench:
    """The models and texts that arms share. Numbers: nats a token."""

    def __init__(self, model: str, work: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        import nemo_minitron.backend as backend
        from nemo_minitron.data import Tokens, build, load_tokenizer

        backend.setup()
        self.model, self.work, self.settings, self.rows = model, work, settings, rows
        tokenizer = load_tokenizer(model)
        self.tokens: dict[tuple[str, str], Tokens] = {}
        for corpus, texts in {WIKIPEDIA: demo(), MANUAL: manual(work)}.items():
            for split, text in texts.items():
                self.tokens[corpus, split] = build(str(text), tokenizer, work / f"{corpus} {split}")
        self.plans: dict[tuple[str, str], Any] = {}
        self.teacher = self.load_teacher()

    def load_teacher(self) -> Any:
        """The teacher, measured and scored before it loses its head to the step."""
        from nemo_minitron.distillation.teacher import Teacher
        from nemo_minitron.hosts.nemo.distill import model_inputs

        chunk = self.load()
        self.vocab_size = chunk.vocab_size
        for corpus in (WIKIPEDIA, MANUAL):
            self.known(f"teacher, {corpus}", partial(self.loss, chunk, corpus))
        self.scores = self.score(chunk)
        return Teacher([chunk], model_inputs)

    def load(self, plan: Any = None) -> Any:
        from nemo_minitron.hosts.nemo.models import load_model

        return load_model(self.model, plan, precision="bf16")[0]

    def score(self, chunk: Any) -> Any:
        from nemo_minitron.importance import estimate

        rows = self.tokens[WIKIPEDIA, "train"].windows(self.settings["sequence length"], CALIBRATION, 0)
        return estimate(chunk, rows.split(4))

    def known(self, name: str, make: Callable[[], float]) -> float:
        """A held-out loss of `work`/known.json, made where it is not there."""
        file, held = self.work / KNOWN, held_in(self.work / KNOWN)
        if name not in held:
            held[name] = make()
            file.write_text(json.dumps(held, indent=1))
        return held[name]

    def loss(self, chunk: Any, corpus: str) -> float:
        count = self.settings["held-out tokens"] // HELD_OUT
        return held_out_loss(chunk, self.tokens[corpus, "test"].windows(HELD_OUT + 1, count), self.vocab_size)

    def training_rows(self, corpus: str, steps: int, seed: int) -> Any:
        return self.tokens[corpus, "train"].windows(self.settings["sequence length"] + 1, steps, seed)

    # -- an arm ---------------------------------------------------------------------------------------
    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        steps = self.steps(arm)
        rows = self.training_rows(arm.corpus, steps, seed)
        row: dict[str, Any] = {"arm": arm.name, "seed": seed, "tokens": steps * self.settings["sequence length"]}
        teacher = self.teacher
        if arm.corrected:
            teacher, row["teacher corrected"] = self.correct(rows, arm.corpus)
        if arm.made == "chain":
            student, rows = self.chain(arm, rows, seed), rows[steps // 2 :]
            before = self.loss(student, arm.corpus)
        else:
            student = self.student(arm, seed)
            name = f"{arm.cut}, {arm.made}, {arm.corpus}, {f'random {seed}' if arm.random else 'pruned'}"
            before = self.known(name, lambda: self.loss(student, arm.corpus))
        row |= {"parameters": sum(p.numel() for p in student.parameters()), "before": round(before, 4)}
        row |= self.train(student, arm, rows, teacher, seed)
        return row | {"after": round(self.loss(student, arm.corpus), 4)}

    def steps(self, arm: Arm) -> int:
        """Of equal tokens; or of equal CPU time, by the first seed's seconds a step."""
        equal = self.settings["tokens"] // self.settings["sequence length"]
        if not arm.equal_time:
            return equal
        pace = self.pace(arm.cut)
        return round(equal * pace["kl"] / pace[arm.loss])

    def pace(self, cut: str) -> dict[str, float]:
        """CPU seconds a step of each loss, measured in turn: `work`/pace.json, made where it is not there."""
        file, held = self.work / PACE, held_in(self.work / PACE)
        if cut not in held:
            rows, schedule = self.training_rows(WIKIPEDIA, TURNS, 0), Schedule()
            steps = {loss: self.step(*weights, self.teacher) for loss, weights in WEIGHTS.items()}
            trainings = {loss: Training(self.load(self.plan(cut, "in one shot")), TURNS, schedule) for loss in steps}
            turns = [{n: t.run(steps[n], [row])["CPU s a step"] for n, t in trainings.items()} for row in rows]
            held[cut] = {loss: statistics.median(turn[loss] for turn in turns[1:]) for loss in steps}
            file.write_text(json.dumps(held, indent=1))
        return held[cut]

    def plan(self, cut: str, made: str) -> Any:
        from nemo_minitron.artifacts import PrunePlan
        from nemo_minitron.search import plan

        if (cut, made) not in self.plans:
            if made == "two rounds":
                first = plan(self.scores, HALFWAY)
                second = plan(self.score(self.load(first)), CUTS[cut])
                kept = {n: [first.keep["ffn"][n][i] for i in units] for n, units in second.keep["ffn"].items()}
                self.plans[cut, made] = PrunePlan(first.source, second.target, {"ffn": kept})
            else:
                self.plans[cut, made] = plan(self.scores, CUTS[cut])
        return self.plans[cut, made]

    def student(self, arm: Arm, seed: int) -> Any:
        from nemo_minitron.megatron.live import fill
        from nemo_minitron.megatron.random_start import RandomStart

        plan = self.plan(arm.cut, arm.made)
        student = self.load(plan)
        if arm.random:
            fill([student], RandomStart(plan.target, seed))
        return student

    def chain(self, arm: Arm, rows: Any, seed: int) -> Any:
        """Cut halfway, trained on the first half of the rows, scored again and cut to the arm's size."""
        from nemo_minitron.megatron.live import LiveSource, fill
        from nemo_minitron.search import plan

        first = plan(self.scores, HALFWAY)
        middle = self.load(first)
        self.train(middle, arm, rows[: len(rows) // 2], self.teacher, seed)
        second, student = plan(self.score(middle), CUTS[arm.cut]), self.load(self.plan(arm.cut, "in one shot"))
        fill([student], LiveSource([middle], first.target), second)
        return student

    def correct(self, rows: Any, corpus: str) -> tuple[Any, float]:
        """A teacher that has learned these rows, and its held-out loss."""
        from nemo_minitron.distillation.teacher import Teacher
        from nemo_minitron.hosts.nemo.distill import model_inputs

        chunk, schedule = self.load(), Schedule()
        gentle = dataclasses.replace(schedule, peak=schedule.peak / 5, least=schedule.least / 5)
        Training(chunk, len(rows), gentle).run(self.step(0.0, 1.0), rows)
        loss = round(self.loss(chunk, corpus), 4)
        return Teacher([chunk], model_inputs), loss

    # -- what a step does -----------------------------------------------------------------------------
    def train(self, student: Any, arm: Arm, rows: Any, teacher: Any, seed: int) -> dict[str, Any]:
        training = Training(student, len(rows), Schedule())
        if arm.loss == "cached":
            return training.run(self.cached_step(rows, seed), rows)
        weights = WEIGHTS[arm.loss]
        if not arm.intermediate:
            return training.run(self.step(*weights, teacher), rows)
        meter, states = self.intermediate(student, arm)
        result = training.run(
            self.step(*weights, teacher, meter), rows, before=states.expect,
            after=lambda rate: states.finish(meter.reduce(), rate),
        )  # fmt: skip
        states.remove()
        return result

    def step(self, logits: float, lm: float, teacher: Any = None, meter: Any = None) -> Any:
        from nemo_minitron.distillation.step import Objective, distillation_step
        from nemo_minitron.hosts.nemo.distill import model_inputs

        objective = Objective(self.vocab_size, logits_weight=logits, lm_weight=lm)
        return distillation_step(objective, model_inputs, teacher if logits else None, meter)

    def intermediate(self, student: Any, arm: Arm) -> tuple[Any, Any]:
        from nemo_minitron.distillation.intermediate import Intermediate
        from nemo_minitron.distillation.layer_map import automatic
        from nemo_minitron.distillation.meter import Meter

        plan = self.plan(arm.cut, arm.made)
        pairs = automatic(plan.kept_layers, plan.source.num_layers)
        meter = Meter(["logits", *map(str, pairs)])
        return meter, Intermediate(pairs, [student], self.teacher, meter=meter)

    def cached_step(self, rows: Any, seed: int) -> Any:
        from nemo_minitron.artifacts.cache_settings import CacheSettings
        from nemo_minitron.artifacts.logit_cache import CacheHeader
        from nemo_minitron.distillation.cache import CachedTeacher, make
        from nemo_minitron.distillation.cache.objective import CachedObjective, with_targets
        from nemo_minitron.distillation.step import distillation_step
        from nemo_minitron.hosts.nemo.distill import model_inputs

        folder, tokens = self.work / f"cache {seed}", rows[:, :-1].numpy()
        header = CacheHeader(CacheSettings(tokens.shape[1]), "model", f"seed {seed}", self.vocab_size, len(tokens))
        header.save(folder)
        make([self.load()], header, folder, lambda row: tokens[row])
        cached = CachedTeacher(folder)
        forward = distillation_step(CachedObjective(self.vocab_size, cached=cached), model_inputs)
        data_step = with_targets(next, cached)
        return lambda model, batch: forward(model, data_step(iter([batch])))


def held_in(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def demo() -> dict[str, Path]:
    return {split: common.ROOT / f"demo/wikipedia/{split}.jsonl" for split in ("train", "test")}


def manual(work: Path) -> dict[str, Path]:
    """Python's reference manual (`pydoc_data.topics`) as two JSONL files."""
    from pydoc_data.topics import topics

    texts = [json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)]
    files = {"train": work / "manual.train.jsonl", "test": work / "manual.test.jsonl"}
    files["train"].write_text("".join(text for i, text in enumerate(texts) if i % EVERY))
    files["test"].write_text("".join(texts[::EVERY]))
    return files


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default=str(common.ROOT / "demo/smollm2-135m-instruct"))
    parser.add_argument("--work", type=Path, default=common.ROOT / "runs/retraining")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens that an arm trains on")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=4096, help="tokens of the held-out text")
    parser.add_argument("--resume", type=Path, help="an older result; its rows are not run again")
    parser.add_argument("--report", action="store_true", help="only print the table")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    settings = {
        "model": Path(arguments.model).name, "tokens": arguments.tokens, "sequence length": arguments.sequence_length,
        "held-out tokens": arguments.held_out, "schedule": dataclasses.asdict(Schedule()), "precision": "bf16",
        "threads": 1,
    }  # fmt: skip
    state, head = State(arguments.work, settings, arguments.resume), common.heading(("torch", "megatron-core"))
    if not arguments.report and state.left():
        run(arguments.model, arguments.work, settings, state)
    show(summary(state.rows), state.left())
    result = {
        **head, "settings": settings,
        "losses untrained": held_in(arguments.work / KNOWN),
        "CPU s a step, in turn": held_in(arguments.work / PACE),
        "summary": summary(state.rows), "not run": [f"{arm.name}, seed {seed}" for arm, seed in state.left()],
        "rows": state.rows,
    }  # fmt: skip
    common.write(result, arguments.out)


def run(model: str, work: Path, settings: dict[str, Any], state: State) -> None:
    import torch

    torch.set_num_threads(settings["threads"])
    bench = Bench(model, work, settings, state.rows)
    for arm, seed in state.left():
        state.add(bench.run(arm, seed))
        gc.collect()  # Megatron's DDP and its optimizer hold each other: 0.7 GB an arm
        last = state.rows[-1]
        print(f"{arm.name}, seed {seed}: {last['before']} -> {last['after']}, {last['CPU s a step']} s", flush=True)


if __name__ == "__main__":
    main()
