"""Times losses, scoring and distillation steps on one Hopper, in one call of under ten minutes (`gpu_session.py` runs
it with all else that only a GPU shows):

    python benchmarks/gpu.py                            # writes benchmarks/results/DATE_gpu.json
    python benchmarks/gpu.py --device cpu --quick       # runs every line at pico sizes; its numbers mean nothing

Losses: 8,192 x 128,256 logits in bf16, forward and backward: ours, in place, modelopt's, and the fused head beside
Liger's, over their four matrix products; `bandwidth` is what the KL must move at least (both logits twice, one
gradient) over the time and over a copy's bandwidth. Importance: a forward pass that scores, over a plain one. Steps: a
teacher of Llama's shape and its width cut, random weights, in bf16, with an FP8 teacher, and in FP8 both: tokens a
second, MFU (against the bf16 peak, in all of them), memory beside the dry run's, and the names of FP8's kernels. Then a
teacher that lies in the CPU's memory between steps, over one that stays. A model that does not fit gets fewer layers;
the row says how many. Without Transformer Engine FP8 is emulated, which says nothing about time, so those rows are left
out. If a part fails, the others still run, and the exit code is 1; the file is written after each part.
"""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
from gpu_steps import PICO, SHAPES, config_of, model, steps, teachers

STARTED = time.perf_counter()
PACKAGES = ["torch", "megatron-core", "nemo_toolkit", "transformer-engine", "triton", "nvidia-modelopt", "liger-kernel"]
LIMIT = 510  # seconds from the start; no part starts later (the longest takes under a minute)
LOSSES = ("ours", "ours, in place", "modelopt", "fused head", "Liger")


class Bench:
    """A device, its clock and its sizes."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick, self.shapes = device, quick, PICO if quick else SHAPES
        self.repetitions, self.length = (2, 32) if quick else (10, 4096)
        self.tokens, self.vocab = (64, 640) if quick else (8192, 128_256)

    def seconds(self, run: Callable[[], object], repetitions: int | None = None) -> float:
        """The median of a few runs, after two runs to warm up."""
        return statistics.median([self.once(run) for _ in range((repetitions or self.repetitions) + 2)][2:])

    def once(self, run: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def memory(self, run: Callable[[], object]) -> int | None:
        """The peak of memory above that before the run, in bytes; None without a GPU."""
        import torch

        if self.device == "cpu":
            run()
            return None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def wait(self) -> None:
        import torch

        if self.device != "cpu":
            torch.cuda.synchronize()

    def bandwidth(self) -> float:
        """The bytes a second that a copy reads and writes."""
        import torch

        x = torch.empty(2**20 if self.quick else 2**30, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        return 2 * x.numel() / self.seconds(lambda: y.copy_(x))


def product(given: dict[str, Any]) -> None:
    """One of the head's matrix products, by chunks of tokens; logits and three gradients make four."""
    for rows in given["hidden"][:, 0].split(1024):
        rows @ given["weight"].t()


def losses(bench: Bench) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    def of(name: str) -> dict[str, Any]:
        import torch
        from distillation_loss import FROM_HIDDEN, _loss
        from megatron.core import parallel_state

        def random(*shape: int, scale: float = 1.0) -> Any:
            return torch.randn(*shape, device=bench.device, dtype=torch.bfloat16).mul_(scale)

        size = 16 if bench.quick else 2048
        if name in FROM_HIDDEN:
            given = {"hidden": random(bench.tokens, 1, size), "teacher_hidden": random(bench.tokens, 1, size)}
            given |= {key: random(bench.vocab, size, scale=3 * size**-0.5) for key in ("weight", "teacher_weight")}
        else:
            given = {key: random(bench.tokens, 1, bench.vocab, scale=3.0) for key in ("student", "teacher")}
        run = _loss(name, "bfloat16", parallel_state.get_tensor_model_parallel_group())
        memory = bench.memory(lambda: run(given))
        took = bench.seconds(lambda: run(given))
        row: dict[str, Any] = {"ms": took * 1e3, "bytes": memory}
        if name in FROM_HIDDEN:
            row["over its four products"] = took / (4 * bench.seconds(lambda: product(given)))
        else:
            row["bandwidth"] = 5 * bench.tokens * bench.vocab * 2 / took / bench.bandwidth()
        return row

    for name in LOSSES:
        yield f"loss: {name}", lambda name=name: of(name)


def importance(bench: Bench) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    def run() -> dict[str, Any]:
        import torch

        from nemo_minitron.importance import estimate

        extra, teacher, _ = next(iter(bench.shapes.values()))
        built = model(config_of(teacher, extra, bench.vocab), "bf16", False).eval()
        rows = torch.randint(bench.vocab, (4, bench.length), device=bench.device)
        places = torch.arange(bench.length, device=bench.device)[None]

        plain = torch.no_grad()(lambda: [built(row[None], places, None) for row in rows])
        count = 2 if bench.quick else 5
        forward = bench.seconds(plain, count)
        scored = bench.seconds(lambda: estimate(built, list(rows[:, None])), count)
        return {"plain s": forward, "scored s": scored, "ratio": scored / forward}

    yield "importance: scored over plain", run


def measured(bench: Bench, save: Callable[[dict[str, Any]], object], only: str = "") -> bool:
    """Runs the parts whose names begin with `only`; each gives numbers or the error that ended it. `save` gets all
    results so far after each part. Returns whether all gave numbers, but those of a package that is not installed."""
    import torch

    import nemo_minitron.backend as backend

    engine = not backend.setup().reference  # before Megatron is imported
    from nemo_minitron.megatron.groups import start

    start()
    print(f"layers: {'Transformer Engine' if engine else 'reference (Transformer Engine is missing: no FP8 is timed)'}")
    results: dict[str, Any] = {"Transformer Engine": engine}
    for name, run in [*losses(bench), *importance(bench), *steps(bench, engine), *teachers(bench)]:
        if not name.startswith(only):
            continue
        began = time.perf_counter()
        try:
            results[name] = run() if began - STARTED < LIMIT else {"error": f"left out: {LIMIT} s were over"}
        except ModuleNotFoundError as error:
            results[name] = {"left out": f"{error.name} is not installed"}
        except Exception as error:  # the next part may work
            *_, at = traceback.extract_tb(error.__traceback__)
            results[name] = {"error": f"{type(error).__name__}: {error}"[:500], "where": f"{at.filename}:{at.lineno}"}
        results[name]["seconds in all"] = round(time.perf_counter() - began, 1)
        gc.collect()
        if bench.device != "cpu":
            torch.cuda.empty_cache()
        print(f"{name:34}" + "  ".join(f"{key} {_short(value)}" for key, value in results[name].items()), flush=True)
        save(results)
    rows = [row for row in results.values() if isinstance(row, dict)]
    return bool(rows) and not any("error" in row for row in rows)


def _short(value: Any) -> str:
    value = f"({len(value)})" if isinstance(value, list) else value
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="pico sizes")
    parser.add_argument("--only", default="", help="the beginning of the parts' names, e.g. 'step: Llama-3.1-8B'")
    parser.add_argument("--out", type=Path, help="the JSON; default: benchmarks/results/DATE_gpu.json")
    arguments = parser.parse_args()
    import torch

    gpu = arguments.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --device cpu --quick runs every part at pico sizes")
    result = common.heading(PACKAGES)
    result["machine"]["device"] = torch.cuda.get_device_name() if gpu else "CPU"
    out = arguments.out or common.dated("gpu")
    bench = Bench(arguments.device, arguments.quick)
    whole = measured(bench, lambda found: common.write(result | {"found": found}, out), arguments.only)
    print(out)
    raise SystemExit(0 if whole else 1)


if __name__ == "__main__":
    main()
