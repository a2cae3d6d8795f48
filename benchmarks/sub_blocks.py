"""MLP sub-blocks fitted as a whole after a cut of neurons, an experiment: SmolLM2-135M, ffn 1536 -> 1024, as cut:
`python benchmarks/sub_blocks.py --novels r-cran-janeaustenr_1.0.0-1_all.deb --out RESULT.json`.

Each MLP of the student learns to write what the teacher's MLP writes, by Adam (2510.14444 calls it local
reconstruction). Arms: `slices`; `least squares` (the last matrix, as `minitron compensate` solves it); `fit` of gate,
up and down from either start; and `in sequence`: the MLP reads the stream of the student as fitted so far, and aims at
the teacher's stream behind it, so that it also mends what earlier layers left. `weighted`: a token's error counts by
one over the mean square of the teacher's stream behind it, as the next norm sees it; every fit is weighted.
`distilled` is the control: from least squares, forward KL on the teacher's logits for the CPU seconds of the fit.

The selection (mean |activation|) comes from the first 8,192 calibration tokens and serves all points. Fits stop early
on four calibration rows that they do not read. Residuals: squared error over the square of what the teacher's MLPs
write (in sequence: of what they should write), on four held-out rows of Wikipedia, mean over layers. Losses: nats a
token on held-out text (`texts.py`); a standard error is that of the difference from least squares of as many tokens,
over the rows. Each finished arm is written to `--out`, and each finished layer to `--work`; a second start goes on from
there. `--quick` is a smoke run. All is fp32 in one thread.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import common
import texts
import torch
from compensation_curve import compared
from dense_students import Dense
from sub_block_fits import Fit, Pairs, fit, kept_neurons, least_squares, residual, slices
from torch import Tensor
from torch.nn import functional as F

KEEP, LENGTH, SEED, RIDGE = 1024, 512, 1234, 0.01
POOL, SELECT, ASIDE = 256, 16, 4  # calibration rows: in all, for the selection, and for early stopping
SLICES, SOLVED, DISTILLED = "slices", "least squares", "distilled"
ARMS = (SOLVED, SLICES, "weighted least squares", "least squares in sequence", "fit from slices",
        "fit from least squares", "fit in sequence", DISTILLED)  # fmt: skip
FIT = "fit from least squares"  # whose seconds the control gets


class Layers:
    """The teacher's layers, one sub-block at a time, on many rows [R, S, H]."""

    def __init__(self, teacher: Any) -> None:
        self.body = teacher.model
        self.rotary = self.body.rotary_emb(torch.zeros(1), torch.arange(LENGTH)[None])

    def attended(self, layer: Any, stream_RSH: Tensor) -> Tensor:
        """The stream behind a layer's attention."""
        parts = [
            part + layer.self_attn(layer.input_layernorm(part), position_embeddings=self.rotary, attention_mask=None)[0]
            for part in stream_RSH.split(8)
        ]
        return torch.cat(parts)

    def read(self, layer: Any, stream_RSH: Tensor) -> Tensor:
        """What the layer's MLP reads, [T, H]."""
        return torch.cat([layer.post_attention_layernorm(part).flatten(0, 1) for part in stream_RSH.split(8)])


def written(mlp: Any, inputs_TH: Tensor) -> Tensor:
    return torch.cat([mlp(x) for x in inputs_TH.split(4096)])


class Point:
    """All arms of one number of calibration tokens. Rows: those to learn from, then `ASIDE`, then those held out."""

    def __init__(self, bench: Bench, tokens: int, arms: list[str]) -> None:
        self.teacher, self.layers, self.arms = bench.teacher, Layers(bench.teacher), arms
        self.learn, self.steps = tokens, bench.options.passes * tokens // bench.how.batch
        self.how, self.count = bench.how, bench.options.layers
        self.file = bench.options.work / f"{tokens} tokens.pt"  # what is done, layer by layer
        self.rows = torch.cat([bench.pool[: tokens // LENGTH], bench.pool[-ASIDE:], bench.test])
        self.key = [str(bench.options.model), arms, bench.result["settings"]]
        self.made: dict[str, list[Dense]] = {arm: [] for arm in arms}
        self.residuals: dict[str, list[float]] = {arm: [] for arm in arms}
        self.looks: list[list[float]] = []
        self.seconds = dict.fromkeys([*arms, "teacher"], 0.0)
        self.clock = time.process_time()

    def save(self, done: int, stream: Tensor, own: dict[str, Tensor]) -> None:
        weights = {arm: [(made.gate, made.up, made.down) for made in layers] for arm, layers in self.made.items()}
        state = {"key": self.key, "done": done, "stream": stream, "own": own, "weights": weights}
        state |= {"residuals": self.residuals, "looks": self.looks, "seconds": self.seconds}
        torch.save(state, self.file.with_suffix(".new"))
        self.file.with_suffix(".new").replace(self.file)

    def load(self) -> tuple[int, Tensor, dict[str, Tensor]]:
        """(layers done, the teacher's stream behind them, those of the arms in sequence)."""
        stream = self.teacher.model.embed_tokens(self.rows)
        state = torch.load(self.file, weights_only=True) if self.file.exists() else {"key": None}
        if state["key"] != self.key:
            return 0, stream, {arm: stream.clone() for arm in self.arms if "in sequence" in arm}
        self.made = {arm: [Dense(*three) for three in layers] for arm, layers in state["weights"].items()}
        self.residuals, self.looks, self.seconds = state["residuals"], state["looks"], state["seconds"]
        return state["done"], state["stream"], state["own"]

    def spent(self, arm: str) -> None:
        """Books the CPU seconds since the last call."""
        now = time.process_time()
        self.seconds[arm], self.clock = self.seconds[arm] + now - self.clock, now

    @torch.no_grad()
    def run(self) -> None:
        done, stream, own = self.load()
        for number, layer in enumerate(self.teacher.model.layers[done : self.count], done):
            stream = self.layers.attended(layer, stream)
            inputs = self.layers.read(layer, stream)
            aims = written(layer.mlp, inputs)
            stream += aims.view_as(stream)
            weights = 1 / stream.flatten(0, 1).square().mean(-1, keepdim=True)
            self.spent("teacher")
            kept = kept_neurons(layer.mlp, inputs[: SELECT * LENGTH], KEEP)
            plain = {arm: Pairs(inputs, aims, weights) for arm in self.arms if arm not in own}
            self.fit_layer(slices(layer.mlp, kept), plain, number)
            for arm in own:
                own[arm] = self.layers.attended(layer, own[arm])
                read = self.layers.read(layer, own[arm])
                pairs = Pairs(read, (stream - own[arm]).flatten(0, 1), weights)
                self.fit_layer(slices(layer.mlp, kept), {arm: pairs}, number)
                own[arm] += written(self.made[arm][-1], read).view_as(own[arm])
                self.spent(arm)
            self.save(number + 1, stream, own)
            print(number, {arm: round(found[-1], 4) for arm, found in self.residuals.items()}, flush=True)

    def fit_layer(self, start: Dense, plain: dict[str, Pairs], number: int) -> None:
        begin, end = self.learn, self.learn + ASIDE * LENGTH
        for arm, pairs in plain.items():
            learn, check, test = pairs.part(slice(begin)), pairs.part(slice(begin, end)), pairs.part(slice(end, None))
            made = self.made_of(arm, start, learn, check, number)
            self.made[arm].append(made)
            self.spent(arm)
            self.residuals[arm].append(residual(made, test, weighted=False))

    def made_of(self, arm: str, start: Dense, learn: Pairs, check: Pairs, number: int) -> Dense:
        if arm == SLICES:
            return start
        ones = Pairs(learn.inputs_TH, learn.aims_TH, torch.ones_like(learn.weights_T1))
        if arm == SOLVED:
            return least_squares(start, ones, RIDGE)
        if arm == "weighted least squares" or arm == "least squares in sequence":
            return least_squares(start, learn, RIDGE)
        if arm == FIT:
            start = self.made[SOLVED][-1]
        elif arm == "fit in sequence":
            start = least_squares(start, learn, RIDGE)
        with torch.enable_grad():
            made, looks = fit(start, learn, check, self.steps, self.how, SEED + number)
        if arm == FIT:
            self.looks.append([round(x, 4) for x in looks])
        return made

    def student(self, arm: str) -> Any:
        student = copy.deepcopy(self.teacher)
        for layer, made in zip(student.model.layers, self.made[arm], strict=False):
            layer.mlp = Dense(made.gate, made.up, made.down)
        return student


def distil(student: Any, teacher: Any, rows: Tensor, seconds: float) -> int:
    """Forward KL on one row a step, every weight, until `seconds` of CPU time are over; the steps made."""
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    begin, steps, schedule = time.process_time(), 0, Fit(peak=3e-4)
    student.train()
    while (share := (time.process_time() - begin) / seconds) < 1:
        row = rows[steps % len(rows)][None]
        with torch.no_grad():
            aim = teacher(row).logits.log_softmax(-1)
        loss = F.kl_div(student(row).logits.log_softmax(-1), aim, log_target=True, reduction="none").sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = schedule.rate(share)
        optimizer.step()
        steps += 1
    return steps


class Bench:
    """The teacher, the texts and the result file."""

    def __init__(self, options: Any) -> None:
        from transformers import AutoModelForCausalLM

        from nemo_minitron.data import build, load_tokenizer

        self.options, self.out, self.how = options, options.out, Fit(peak=options.rate)
        self.teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        self.teacher.requires_grad_(False)
        tokenizer, work = load_tokenizer(options.model), options.work
        files = texts.write_texts(work, options.novels)
        held = {name: build(str(files[name]), tokenizer, work / f"{name} tokens") for name in options.texts}
        self.held = {name: text.windows(LENGTH + 1, options.held_out // LENGTH) for name, text in held.items()}
        self.test = self.held["wikipedia"][-ASIDE:, :-1]
        train = build(str(texts.TRAIN), tokenizer, work / "train tokens")
        self.pool = train.windows(LENGTH, POOL + ASIDE, SEED)
        names = ("held_out", "passes", "rate", "layers", "texts")
        settings = {name: getattr(options, name) for name in names} | {"keep": KEEP, "seed": SEED, "ridge": RIDGE}
        head = common.heading(("torch", "transformers")) | {"settings": settings, "rows": []}
        self.result = json.loads(self.out.read_text()) if self.out.exists() else head
        if self.result["settings"] != settings:
            raise SystemExit(f"{self.out} was started with {self.result['settings']}, not {settings}")

    def find(self, tokens: int, arm: str) -> dict[str, Any] | None:
        return next((r for r in self.result["rows"] if (r["tokens"], r["arm"]) == (tokens, arm)), None)

    @torch.inference_mode()
    def losses(self, model: Any) -> dict[str, list[float]]:
        """Text -> the mean loss of each row."""
        model.eval()
        return {
            name: [round(float(F.cross_entropy(model(row[None, :-1]).logits[0], row[1:])), 5) for row in rows]
            for name, rows in self.held.items()
        }

    def add(self, tokens: int, arm: str, losses: dict[str, list[float]], **more: Any) -> None:
        row: dict[str, Any] = {"tokens": tokens, "arm": arm, **more}
        row |= {name: round(statistics.fmean(each), 4) for name, each in losses.items()}
        base = self.find(tokens, SOLVED)
        if base is not None:
            row["difference"] = {name: compared(losses, base["loss of each row"], name) for name in losses}
        self.result["rows"].append(row | {"loss of each row": losses})
        common.write(self.result, self.out)
        print(row, flush=True)

    def point(self, tokens: int) -> None:
        left = [arm for arm in self.options.arms if not self.find(tokens, arm)]
        needed = [arm for arm in ARMS if arm in {*left, *([SOLVED] if {FIT, DISTILLED} & {*left} else [])}]
        if not left:
            return
        point = Point(self, tokens, [arm for arm in needed if arm != DISTILLED])
        point.run()
        for arm in [arm for arm in point.arms if arm in left]:
            cost = {"CPU s": round(point.seconds[arm], 1), "teacher's CPU s": round(point.seconds["teacher"], 1)}
            found = round(statistics.fmean(point.residuals[arm]), 5)
            more = {"steps": point.steps, "looks": point.looks} if arm == FIT else {}
            self.add(tokens, arm, self.losses(point.student(arm)), residual=found, **cost, **more)
        if DISTILLED in left:
            self.control(tokens, point.student(SOLVED))
        point.file.unlink()

    def control(self, tokens: int, student: Any) -> None:
        given = self.find(tokens, FIT)
        if given is None:
            raise SystemExit(f"the control of {tokens} tokens gets the seconds of '{FIT}', which has not run")
        student.requires_grad_(True)
        rows = self.pool[:-ASIDE].view(-1, LENGTH // 2)
        steps = distil(student, self.teacher, rows, given["CPU s"])
        self.add(tokens, DISTILLED, self.losses(student), **{"CPU s": given["CPU s"], "steps": steps})


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        cells = [f"{row[n]:8.4f} {d:+8.4f} ({e:.4f})" for n, (d, e) in row.get("difference", {}).items()]
        found = f"{row['residual']:9.4f}" if "residual" in row else " " * 9
        print(f"{row['tokens']:8}  {row['arm']:28}{found}{row['CPU s']:8.0f} s", *cells)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default=str(common.MODEL))
    parser.add_argument("--work", type=Path, default=common.ROOT / "runs/sub_blocks")
    parser.add_argument("--novels", type=Path, help="the .deb of r-cran-janeaustenr; needed once")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072], help="of the calibration")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--texts", nargs="+", default=["wikipedia", "manual"], choices=texts.TEXTS)
    parser.add_argument("--held-out", type=int, default=4096, help="tokens of each held-out text")
    parser.add_argument("--passes", type=int, default=1, help="of a fit through its tokens")
    parser.add_argument("--rate", type=float, default=1e-3, help="Adam's highest, of the fits")
    parser.add_argument("--layers", type=int, default=30, help="that are cut, the first ones")
    parser.add_argument("--quick", action="store_true", help="few tokens and layers, to see that it runs")
    parser.add_argument("--out", type=Path, default=common.dated("sub_blocks"))
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.layers, options.held_out = [8192], min(options.layers, 2), 2048
    torch.set_num_threads(1)
    bench = Bench(options)
    for tokens in options.tokens:
        bench.point(tokens)
    show(bench.result["rows"])


if __name__ == "__main__":
    main()
