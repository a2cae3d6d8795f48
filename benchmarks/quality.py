"""The best student for its bytes: five cuts of SmolLM2-135M, by Model Optimizer 0.37 and by this package, as cut and
after equal training: `python benchmarks/quality.py --novels r-cran-janeaustenr_1.0.0-1_all.deb --out RESULT.json`.

Arms: `model optimizer` (its selection and plain cut, on a CPU: `quality_peer.py`), `slices` (our selection alone),
`job` (what a job does by default: norms folded, matrices re-fitted, writers scaled behind dropped layers), `unscaled`
(a job without the last, where a cut has layers and more), `rotated` (a job that turns the residual stream to its
principal axes first, where a cut has hidden channels), `reconstructed` (a job whose sub-blocks are fitted as a whole in
PASSES passes, where a cut has neurons or heads), `filled` (a job that fills the gaps of dropped layers), and `both` (a
job that rotates and fills, where a cut has layers and hidden channels). Every arm reads the same calibration rows.
Losses, in nats a token, are measured on held-out Wikipedia, a novel and Python's manual (`texts.py`); calibration and
training read Wikipedia's other articles. Excess is the loss above the teacher's, and the ratio is to Model Optimizer's
excess.

`--tokens N` trains the students, with each of `--seeds` (a seed draws the rows, the same for every arm), with the
package's step and Megatron's optimizer, without a trainer. `--cuts` and `--arms` choose. Each measurement is written to
`--out` as it comes; a second start skips what is there; `--report` only prints. Seconds and peak resident memory are
those of the processes that choose and fit; the writing of a student is not part of them.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import common
import texts
from quality_table import PEER, show, table
from short_training import Schedule, Training, batch_of

from nemo_minitron.settings.precision import best_precision

SLICES, UNSCALED, JOB, ROTATED, RECONSTRUCTED = "slices", "unscaled", "job", "rotated", "reconstructed"
FILLED, BOTH = "filled", "both"
ROTATING, FILLING = (ROTATED, BOTH), (FILLED, BOTH)
ARMS = (PEER, SLICES, UNSCALED, JOB, ROTATED, RECONSTRUCTED, FILLED, BOTH)
PASSES = 4  # of the reconstruction
CUTS: dict[str, tuple[dict[str, int], dict[str, int]]] = {  # ours, and Megatron's names of the same sizes
    "ffn 1024": ({"ffn": 1024}, {"ffn_hidden_size": 1024}),
    "hidden 512": ({"hidden": 512}, {"hidden_size": 512}),
    "heads 6": ({"heads": 6}, {"num_attention_heads": 6, "num_query_groups": 3}),
    "layers 24": ({"layers": 24}, {"num_layers": 24}),
    "all, to 84M": (
        {"layers": 27, "hidden": 512, "ffn": 1024, "heads": 6},
        {"num_layers": 27, "hidden_size": 512, "ffn_hidden_size": 1024, "num_attention_heads": 6,
         "num_query_groups": 3},
    ),
}  # fmt: skip
HELD_OUT, SEED, BATCH = 512, 1234, 4
CLOSE = 1e-3  # nats between the two builds of the teacher, on one row, in fp32
Cost = dict[str, float]


class Results:
    """The result file: settings, and a row for each finished measurement."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.out, head = out, common.heading(("torch", "megatron-core", "nvidia-modelopt"))
        self.result = json.loads(out.read_text()) if out.exists() else {**head, "settings": settings, "rows": []}
        if self.result["settings"] != settings:
            raise SystemExit(f"{out} was started with {self.result['settings']}, not {settings}; give another --out")
        commands = self.result.setdefault("commands", [])
        if head["command"] not in commands:
            commands.append(head["command"])

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.result["rows"]

    def find(self, cut: str, arm: str, seed: int, tokens: int) -> dict[str, Any] | None:
        key = (cut, arm, seed, tokens)
        return next((row for row in self.rows if (row["cut"], row["arm"], row["seed"], row["tokens"]) == key), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.write()
        print({name: value for name, value in row.items() if name != "loss of each row"}, flush=True)

    def write(self) -> None:
        self.result["table"] = list(table(self.rows))
        common.write(self.result, self.out)


class Bench:
    """The files and texts that all arms share."""

    def __init__(self, options: Any, results: Results) -> None:
        import numpy as np

        import nemo_minitron.backend as backend
        from nemo_minitron.data import build, load_tokenizer
        from nemo_minitron.sources.open import open_source

        backend.setup()
        self.schedule = Schedule()
        self.model, self.work, self.options, self.results = options.model, options.work, options, results
        self.source, tokenizer = open_source(options.model), load_tokenizer(options.model)
        self.vocab_size = self.source.architecture.vocab_size
        files, count = texts.write_texts(options.work, options.novels), options.held_out // HELD_OUT
        self.rows = {
            name: build(str(file), tokenizer, self.work / f"{name} tokens").windows(HELD_OUT + 1, count)
            for name, file in files.items()
        }
        self.train_tokens = build(str(texts.TRAIN), tokenizer, self.work / "train tokens")
        self.calibration = self.train_tokens.windows(options.sequence_length, options.samples, SEED)
        np.save(self.work / "rows.npy", self.calibration.numpy())

    # -- what an arm is made of ---------------------------------------------------------------------------
    def minitron(self, *arguments: object) -> Cost:
        return common.run_measured(sys.executable, "-m", "nemo_minitron.cli", *arguments)

    def calibrated(self) -> list[object]:
        o = self.options
        rows = ["--samples", o.samples, "--sequence-length", o.sequence_length, "--batch-size", BATCH, "--seed", SEED]
        return ["--data", texts.TRAIN, *rows]

    def once(self, file: Path, run: Any) -> Cost:
        """The cost of making `file`, kept beside it; it is made where it is not there."""
        costs = file.with_name(f"{file.name}.cost.json")
        if not (file.exists() and costs.exists()):
            file.unlink(missing_ok=True)
            costs.write_text(json.dumps(run(file)))
        return json.loads(costs.read_text())

    def make(self, cut: str, arm: str) -> tuple[Any, Any, dict[str, Cost]]:
        """(Plan, Compensation or None, {step: its cost})."""
        from nemo_minitron.artifacts import PrunePlan
        from nemo_minitron.commands.prune import Extras, compensation_of
        from nemo_minitron.pruning.compensation import can_fold, solvable
        from nemo_minitron.sources.open import open_source

        folder, (model, costs) = self.work / cut, self.uncut(arm)
        folder.mkdir(exist_ok=True)
        if arm == PEER:
            return self.peer(cut, folder)
        before = "rotated " if arm in ROTATING else ""
        keep, scores, file = CUTS[cut][0], self.work / f"{before}scores.safetensors", folder / f"{before}plan.json"
        costs["score"] = self.once(scores, lambda out: self.minitron(
            "estimate", model, *self.calibrated(), "--out", out))  # fmt: skip
        sizes = ",".join(f"{axis}={size}" for axis, size in keep.items())
        costs["plan"] = self.once(file, lambda out: self.minitron("plan", scores, "--keep", sizes, "--out", out))
        plan = PrunePlan.load(file)
        if arm == SLICES:
            return plan, None, costs
        more = ["--fill-gaps"] if arm in FILLING else ["--reconstruct", PASSES] if arm == RECONSTRUCTED else []
        name = arm if more else f"{before}compensation"
        solved = folder / f"{name}.safetensors" if arm in FILLING or list(solvable(plan)) else None
        if solved is not None:
            costs["compensate"] = self.once(solved, lambda out: self.minitron(
                "compensate", model, file, *self.calibrated(), *more, "--out", out))  # fmt: skip
        gaps = arm in (JOB, ROTATED, RECONSTRUCTED) and "layers" in keep
        extras = Extras(solved, can_fold(plan.source, plan.target), scores=scores if gaps else None, scale_gaps=gaps)
        return plan, compensation_of(open_source(model), plan, extras), costs

    def uncut(self, arm: str) -> tuple[str, dict[str, Cost]]:
        """(the model that an arm scores and cuts, the cost of making it)"""
        if arm not in ROTATING:
            return self.model, {}
        out = self.work / "rotated"
        costs = self.once(out / "config.json", lambda _: self.minitron(
            "rotate", self.model, *self.calibrated(), "--out", out))  # fmt: skip
        return str(out), {"rotate": costs}

    def peer(self, cut: str, folder: Path) -> tuple[Any, None, dict[str, Cost]]:
        from nemo_minitron.artifacts import PrunePlan

        sizes, out, a = folder / "sizes.json", folder / "peer.json", self.source.architecture
        sizes.write_text(json.dumps(CUTS[cut][1]))
        script, rows = Path(__file__).with_name("quality_peer.py"), self.work / "rows.npy"
        cost = self.once(out, lambda file: common.run_measured(sys.executable, script, self.model, rows, sizes, file))
        found = json.loads(out.read_text())
        self.check_same(found["loss of the first row"])
        cost |= {"of them to load": found["seconds"]["load"]}
        keep = {axis: kept for axis, kept in found["keep"].items() if axis in CUTS[cut][0]}
        for axis in ("ffn", "heads"):
            if axis in keep:
                keep[axis] = {int(layer): units for layer, units in keep[axis].items()}
        target = a.keep_layers(keep.get("layers", list(range(a.num_layers)))).replace(
            **{field: size for field, size in CUTS[cut][1].items() if field not in ("num_layers", "num_query_groups")}
        )
        return PrunePlan(a, target, keep), None, {"choose and cut": cost}

    def check_same(self, loss: float) -> None:
        """SystemExit if Model Optimizer's build of the teacher is another model than ours."""
        file = self.work / "first row.json"
        if not file.exists():
            from nemo_minitron.hosts.nemo.models import load_model

            row = self.calibration[0]
            file.write_text(json.dumps(self.loss_of_rows(load_model(self.model)[0], [row])[0]))
        ours = json.loads(file.read_text())
        if abs(ours - loss) > CLOSE:
            raise SystemExit(f"Model Optimizer's teacher has a loss of {loss} on the first row, ours {ours}")

    # -- measurements -----------------------------------------------------------------------------------
    def run(self) -> None:
        from nemo_minitron.distillation.teacher import Teacher
        from nemo_minitron.hosts.nemo.distill import model_inputs
        from nemo_minitron.hosts.nemo.models import load_model

        chunk = load_model(self.model, precision=self.options.precision)[0]
        if not self.results.find("none", "teacher", 0, 0):
            self.results.add({"cut": "none", "arm": "teacher", "seed": 0, "tokens": 0, **self.losses(chunk)})
        teacher = Teacher([chunk], model_inputs) if self.options.tokens else None
        for cut, arm, seed, tokens in self.left():
            plan, compensation, costs = self.make(cut, arm)
            model = self.uncut(arm)[0]
            student = load_model(model, plan, compensation=compensation, precision=self.options.precision)[0]
            training = self.train(student, teacher, seed) if seed else {}
            row = {"cut": cut, "arm": arm, "seed": seed, "tokens": tokens, **self.losses(student), **training}
            self.results.add(row if seed else row | {"costs": costs})
            self.results.result["not run"] = [", ".join(map(str, key)) for key in self.left()]
            del student
            gc.collect()  # Megatron's DDP and its optimizer hold each other

    def left(self) -> list[tuple[str, str, int, int]]:
        o = self.options
        pairs = [(cut, arm) for cut in o.cuts for arm in o.arms if _differs(cut, arm)]
        before = [(cut, arm, 0, 0) for cut, arm in pairs]
        after = [(cut, arm, seed, o.tokens) for seed in o.seeds for cut, arm in pairs] if o.tokens else []
        return [key for key in before + after if not self.results.find(*key)]

    def train(self, student: Any, teacher: Any, seed: int) -> dict[str, Any]:
        from nemo_minitron.distillation.step import Objective, distillation_step
        from nemo_minitron.hosts.nemo.distill import model_inputs

        length = self.options.train_length
        rows = self.train_tokens.windows(length + 1, self.options.tokens // length, seed)
        step = distillation_step(Objective(self.vocab_size, logits_weight=1.0), model_inputs, teacher)
        done = Training(student, len(rows), self.schedule, self.options.precision).run(step, rows)
        return {"CPU s a step": done["CPU s a step"]}

    def losses(self, chunk: Any) -> dict[str, Any]:
        each = {name: self.loss_of_rows(chunk, rows) for name, rows in self.rows.items()}
        numbers = {name: round(statistics.fmean(losses), 4) for name, losses in each.items()}
        rounded = {name: [round(x, 4) for x in losses] for name, losses in each.items()}
        return {"parameters": sum(p.numel() for p in chunk.parameters()), **numbers, "loss of each row": rounded}

    def loss_of_rows(self, chunk: Any, rows: Any) -> list[float]:
        import torch

        from nemo_minitron.distillation.step import Objective, distillation_step
        from nemo_minitron.hosts.nemo.distill import model_inputs

        step, training = distillation_step(Objective(self.vocab_size), model_inputs), chunk.training
        chunk.eval()
        with torch.inference_mode():
            losses = [step(chunk, batch_of(row)).double().mean().item() for row in rows]
        chunk.train(training)
        return losses


def _differs(cut: str, arm: str) -> bool:
    """Whether an arm is another student than the job's."""
    axes = {*CUTS[cut][0]}
    if arm in (UNSCALED, BOTH):
        return axes > ({"layers"} if arm == UNSCALED else {"layers", "hidden"})
    needed = {ROTATED: {"hidden"}, RECONSTRUCTED: {"ffn", "heads"}, FILLED: {"layers"}}.get(arm)
    return needed is None or not needed.isdisjoint(axes)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default=str(common.MODEL))
    parser.add_argument("--work", type=Path, default=common.ROOT / "runs/quality")
    parser.add_argument("--novels", type=Path, help="the .deb of r-cran-janeaustenr; needed once")
    parser.add_argument("--samples", type=int, default=32, help="calibration rows")
    parser.add_argument("--sequence-length", type=int, default=512, help="of a calibration row")
    parser.add_argument("--held-out", type=int, default=4096, help="tokens of each held-out text")
    parser.add_argument("--tokens", type=int, default=0, help="that each student is trained on, for example 60000")
    parser.add_argument("--train-length", type=int, default=256, help="of a training row")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the training rows")
    parser.add_argument("--precision", default=best_precision(), choices=("fp32", "bf16"), help="of what is measured")
    parser.add_argument("--cuts", nargs="+", default=list(CUTS), choices=list(CUTS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--report", action="store_true", help="only print the table of --out")
    parser.add_argument("--out", type=Path, default=common.dated("quality"))
    options = parser.parse_args()
    names = ("samples", "sequence_length", "held_out", "train_length")
    settings: dict[str, Any] = {name: getattr(options, name) for name in names} | {"calibration seed": SEED}
    settings |= {
        "model": Path(options.model).name,
        "precision": options.precision,
        "schedule": vars(Schedule()),
        "threads": 1,
    }
    results = Results(options.out, settings)
    if not options.report:
        import torch

        torch.set_num_threads(1)
        Bench(options, results).run()
    show(results.rows)


if __name__ == "__main__":
    main()
