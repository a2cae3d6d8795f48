"""Measures one scalar at each gap of a depth cut of SmolLM2-135M, as cut, on three kinds of held-out text:
`python benchmarks/depth_gaps.py --novels r-cran-janeaustenr_1.0.0-1_all.deb --out RESULT.json`.

Behind removed layers the residual stream of the teacher is longer than what the student carries there: by a, the
exponential of the mean over tokens of log |x behind the block| - log |x before it|. Every matrix that writes to the
stream behind a gap (o and down) is divided by the a of all gaps before it. RMSNorm sees the same directions then as if
the stream had been multiplied by a, apart from its epsilon. `--power 0.5` measures a^0.5, and so on. `projection` is
another scalar: the median over tokens of <x behind, x before> / |x before|^2.

The scalars come from Wikipedia, of which no measured row is read. Losses are nats a token. A standard error is that of
the difference from the plain cut over the held-out rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import texts
from short_training import batch_of

CUTS = {"layers 13 to 18": [*range(13, 19)], "every second of 9 to 19": [*range(9, 20, 2)]}
HELD_OUT, LENGTH, SEED = 512, 512, 1234


class Streams:
    """Numbers of the residual stream at each boundary of the layers, over the tokens that a model sees."""

    def __init__(self, chunk: Any, wanted: list[tuple[int, int]]) -> None:
        """`wanted`: pairs of boundaries whose projections are gathered."""
        self.layers, self.wanted = chunk.decoder.layers, wanted
        self.states: list[Any] = [None] * (len(self.layers) + 1)
        self.logs: list[list[float]] = [[] for _ in self.states]
        self.projections: dict[tuple[int, int], list[Any]] = {pair: [] for pair in wanted}
        for number, layer in enumerate(self.layers):
            layer.register_forward_hook(self._hook(number), with_kwargs=True)

    def _hook(self, number: int) -> Any:
        def hook(_: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            self.states[number] = (args[0] if args else kwargs["hidden_states"]).detach().float()
            if number == len(self.layers) - 1:
                self.states[-1] = (output[0] if isinstance(output, tuple) else output).detach().float()
                self._take()

        return hook

    def _take(self) -> None:
        for sums, state_SBH in zip(self.logs, self.states, strict=True):
            sums.append(state_SBH.norm(dim=-1).log().mean().item())
        for first, after in self.wanted:
            before, behind = self.states[first], self.states[after]
            ratio = (before * behind).sum(-1) / before.square().sum(-1)
            self.projections[first, after].append(ratio.flatten())

    def logs_mean(self) -> list[float]:
        return [statistics.fmean(sums) for sums in self.logs]


def gaps_of(kept: list[int], layers: int) -> Iterator[tuple[int, int]]:
    """(first removed layer, the layer behind the removed block) of each gap."""
    for before, after in zip([-1, *kept], [*kept, layers], strict=True):
        if after > before + 1:
            yield before + 1, after


def factors(scalars: dict[tuple[int, int], float], kept: list[int]) -> list[float]:
    """For each kept layer what its writers are multiplied by: one over all the scalars in front of it."""
    return [math.prod(1 / a for (_, after), a in scalars.items() if after <= layer) for layer in kept]


def scaled(source: Any, plan: Any, by: list[float]) -> Any:
    """The student's writers, each times its layer's factor."""
    from nemo_minitron.artifacts import Compensation
    from nemo_minitron.artifacts.dtypes import as_numbers
    from nemo_minitron.pruning.selection import student_index

    tensors = {}
    for layer, factor in enumerate(by):
        for name in (f"layers.{layer}.o.weight", f"layers.{layer}.down.weight"):
            origin, index = student_index(plan, name)
            if factor != 1.0:
                tensors[name] = (as_numbers(source.read(origin, index), source.dtype(origin)) * factor).astype("f4")
    return Compensation(plan.digest, tensors)


class Bench:
    def __init__(self, options: Any) -> None:
        import nemo_minitron.backend as backend
        from nemo_minitron.data import build, load_tokenizer
        from nemo_minitron.sources.open import open_source

        backend.setup()
        self.model, self.source, self.precision = options.model, open_source(options.model), options.precision
        self.architecture, tokenizer = self.source.architecture, load_tokenizer(options.model)
        files = texts.write_texts(options.work, options.novels)
        count = options.tokens // HELD_OUT
        self.rows = {
            name: build(str(file), tokenizer, options.work / f"{name} tokens").windows(HELD_OUT + 1, count)
            for name, file in files.items()
        }
        train = build(str(texts.TRAIN), tokenizer, options.work / "train tokens")
        self.calibration = train.windows(LENGTH, options.samples, SEED)
        self.kept = {
            name: [n for n in range(self.architecture.num_layers) if n not in gone] for name, gone in CUTS.items()
        }

    def load(self, kept: list[int], by: list[float]) -> Any:
        from nemo_minitron.hosts.nemo.models import load_model

        plan = self.plan(kept)
        compensation = scaled(self.source, plan, by)
        return load_model(self.model, plan, compensation=compensation, precision=self.precision)[0]

    def plan(self, kept: list[int]) -> Any:
        from nemo_minitron.artifacts import PrunePlan

        return PrunePlan(self.architecture, self.architecture.keep_layers(kept), {"layers": kept})

    def calibrate(self, layers: int) -> None:
        """The teacher's numbers, its losses, and the plan's own choice of layers by block influence."""
        import torch

        from nemo_minitron.hosts.nemo.models import load_model
        from nemo_minitron.importance import estimate
        from nemo_minitron.search import plan

        chunk = load_model(self.model, precision=self.precision)[0].eval()
        self.vocab_size = self.architecture.vocab_size
        scores = estimate(chunk, self.calibration.split(4), axes=("layers",), architecture=self.architecture)
        self.kept = {f"{layers} layers by influence": plan(scores, {"layers": layers}).kept_layers, **self.kept}
        pairs = sorted({pair for kept in self.kept.values() for pair in gaps_of(kept, self.architecture.num_layers)})
        self.teacher = self.losses(chunk)
        self.streams = Streams(chunk, pairs)
        with torch.inference_mode():
            for row in self.calibration:
                chunk(row[None], torch.arange(len(row))[None], None)

    def losses(self, chunk: Any) -> dict[str, list[float]]:
        """Text -> the mean loss of each row."""
        import torch

        from nemo_minitron.distillation.step import Objective, distillation_step
        from nemo_minitron.hosts.nemo.distill import model_inputs

        step = distillation_step(Objective(self.vocab_size), model_inputs)
        chunk.eval()
        with torch.inference_mode():
            return {
                name: [step(chunk, batch_of(row)).double().mean().item() for row in rows]
                for name, rows in self.rows.items()
            }

    def scalars(self, kept: list[int], how: str) -> dict[tuple[int, int], float]:
        import torch

        gaps = list(gaps_of(kept, self.architecture.num_layers))
        if how == "projection":
            return {gap: torch.cat(self.streams.projections[gap]).median().item() for gap in gaps}
        logs, power = self.streams.logs_mean(), float(how)
        return {(first, after): math.exp(power * (logs[after] - logs[first])) for first, after in gaps}

    def measure(self, ways: list[str]) -> Iterator[dict[str, Any]]:
        for cut, kept in self.kept.items():
            plain = None
            for how in ("plain", *ways):
                scalars = {} if how == "plain" else self.scalars(kept, how)
                found = self.losses(self.load(kept, factors(scalars, kept)))
                plain = plain or found
                row = {"cut": cut, "how": how} | {name: self.compared(name, found, plain) for name in self.rows}
                row["scalars"] = {f"{first}-{after - 1}": round(a, 4) for (first, after), a in scalars.items()}
                print(row, flush=True)
                yield row

    def compared(self, name: str, found: dict[str, list[float]], plain: dict[str, list[float]]) -> dict[str, float]:
        """Loss, excess over the teacher, the excess over that of the plain cut, and the difference to its loss."""
        loss, base, teacher = (statistics.fmean(losses[name]) for losses in (found, plain, self.teacher))
        pairs = [a - b for a, b in zip(found[name], plain[name], strict=True)]
        error = statistics.stdev(pairs) / math.sqrt(len(pairs))
        numbers = {"loss": loss, "excess": loss - teacher, "ratio": (loss - teacher) / (base - teacher)}
        numbers |= {"difference": loss - base, "standard error": error}
        return {key: round(value, 4) for key, value in numbers.items()}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default=str(common.MODEL))
    parser.add_argument("--work", type=Path, default=common.ROOT / "runs/depth_gaps")
    parser.add_argument("--novels", type=Path, help="the .deb of r-cran-janeaustenr; needed once")
    parser.add_argument("--samples", type=int, default=16, help="calibration rows of 512 tokens")
    parser.add_argument("--tokens", type=int, default=8192, help="of each held-out text")
    parser.add_argument("--layers", type=int, default=24, help="that stay by block influence")
    parser.add_argument("--power", nargs="*", default=["1", "0.5"])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    result, bench = common.heading(("torch", "megatron-core")), Bench(options)
    bench.calibrate(options.layers)
    settings = {name: getattr(options, name) for name in ("samples", "tokens", "precision")} | {"seed": SEED}
    result |= {"settings": settings, "teacher": {k: round(statistics.fmean(v), 4) for k, v in bench.teacher.items()}}
    result["mean log norm of the stream"] = [round(x, 4) for x in bench.streams.logs_mean()]
    result["removed"] = {c: sorted({*range(bench.architecture.num_layers)} - {*k}) for c, k in bench.kept.items()}
    result["rows"] = list(bench.measure([*options.power, "projection"]))
    common.write(result, options.out)


if __name__ == "__main__":
    main()
