"""Everything that wants a GPU, measured on one Hopper in one call of under ten minutes:

    python benchmarks/gpu.py                            # writes benchmarks/results/DATE_gpu.json
    python benchmarks/gpu.py --device cpu --quick       # every line of it, at pico sizes; its numbers mean nothing

Losses: 8,192 x 128,256 logits in bf16, forward and backward: ours, in place, modelopt's, and the fused head beside
Liger's; `bandwidth` is what the KL must move at least (both logits twice, one gradient) over the time and over a copy's
bandwidth. Importance: a forward pass that scores, over a plain one. Steps: a teacher of Llama's shape and its width
cut, random weights, in bf16, with an FP8 teacher, and in FP8 both: tokens a second, MFU (against the bf16 peak, in all
of them), memory. What a device cannot hold has fewer layers, as many as fit; the row says how many. Without Transformer
Engine FP8 is emulated, which says nothing about time: those rows are left out. Each part fails alone, and the file is
written anew after each.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common

STARTED = time.perf_counter()
RESULTS = Path(__file__).parent / "results"
PACKAGES = ["torch", "megatron-core", "nemo_toolkit", "transformer-engine", "triton", "nvidia-modelopt", "liger-kernel"]
PEAK = 989.4e12  # FLOPs a second of an H100 SXM or an H200 in bf16, dense
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 500_000.0, "rms_norm_eps": 1e-5,
    "head_dim": 128, "max_position_embeddings": 8192, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
SHAPES = {  # hidden, ffn, layers, heads, query groups; teacher and student
    "Llama-3.2-1B": ({"head_dim": 64, "tie_word_embeddings": True}, (2048, 8192, 16, 32, 8), (1536, 6144, 16, 32, 8)),
    "Llama-3.1-8B": ({}, (4096, 14336, 32, 32, 8), (3072, 9216, 32, 32, 8)),
}
PICO = {"pico": ({"head_dim": 16}, (64, 128, 4, 4, 2), (48, 96, 4, 4, 2))}
STEPS = {"bf16": ("bf16", "bf16"), "FP8 teacher": ("bf16", "fp8-current"), "all FP8": ("fp8-delayed", "fp8-current")}
LIMIT = 510  # seconds from the start; a part that would begin later is left out (the longest takes under a minute)
LOSSES = ("ours", "ours, in place", "modelopt", "fused head", "Liger")


class Bench:
    """A device, its clock and its sizes."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick, self.shapes = device, quick, PICO if quick else SHAPES
        self.repetitions, self.length = (2, 32) if quick else (10, 4096)
        self.tokens, self.vocab = (64, 640) if quick else (8192, 128_256)

    def seconds(self, run: Callable[[], object], repetitions: int | None = None) -> float:
        """The median of a few, after two to warm up."""
        return statistics.median([self.once(run) for _ in range((repetitions or self.repetitions) + 2)][2:])

    def once(self, run: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def memory(self, run: Callable[[], object]) -> int | None:
        """Bytes above what is held before, at most; None without a GPU."""
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
        """Bytes a second that a copy reads and writes."""
        import torch

        x = torch.empty(2**20 if self.quick else 2**30, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        return 2 * x.numel() / self.seconds(lambda: y.copy_(x))


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
        if name not in FROM_HIDDEN:
            row["bandwidth"] = 5 * bench.tokens * bench.vocab * 2 / took / bench.bandwidth()
        return row

    for name in LOSSES:
        yield f"loss: {name}", lambda name=name: of(name)


def config_of(shape: tuple[int, ...], extra: dict[str, Any], vocab: int, layers: int | None = None) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    found = {**LLAMA, **dict(zip(names, shape, strict=True)), "vocab_size": vocab, **extra}
    return found | ({"num_hidden_layers": layers} if layers else {})


def model(config: dict[str, Any], precision: str, training: bool) -> Any:
    import torch

    from nemo_minitron.job import Layout
    from nemo_minitron.nemo.models import build, nemo_config

    built = build(nemo_config(config, precision=precision, training=training), Layout())[0]
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.02)
    return built


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


def layers_that_fit(bench: Bench, name: str) -> int:
    import torch

    from nemo_minitron.costs import training_memory
    from nemo_minitron.families import from_hf
    from nemo_minitron.job import Layout

    extra, *pair = bench.shapes[name]
    most = pair[0][2]
    if bench.device == "cpu":
        return most
    room = 0.8 * torch.cuda.get_device_properties(0).total_memory
    for layers in range(most, 0, -1):
        teacher, student = (from_hf(config_of(shape, extra, bench.vocab, layers)) for shape in pair)
        settings = {"batch": 1, "context": bench.length, "precision": "fp8-delayed", "teacher": teacher}
        if sum(training_memory(student, Layout(), **settings).values()) < room:
            return layers
    raise RuntimeError(f"not one layer of {name} fits")


def steps(bench: Bench, engine: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for name in bench.shapes:
        for how, precisions in STEPS.items():
            if engine or bench.quick or how == "bf16":
                yield f"step: {name}, {how}", lambda name=name, p=precisions: step(bench, name, *p, engine)


def step(bench: Bench, name: str, student_in: str, teacher_in: str, engine: bool) -> dict[str, Any]:
    import torch
    from distillation_step import trained
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from nemo_minitron.distillation.step import Objective, distillation_step
    from nemo_minitron.distillation.teacher import Teacher
    from nemo_minitron.families import from_hf
    from nemo_minitron.nemo.distill import model_inputs

    extra, *pair = bench.shapes[name]
    layers = layers_that_fit(bench, name)
    configs = [config_of(shape, extra, bench.vocab, layers) for shape in pair]
    teacher = Teacher([model(configs[0], teacher_in, False)], model_inputs)
    student, optimizer = trained(model(configs[1], student_in, True), "bf16")
    forward = distillation_step(Objective(bench.vocab), model_inputs, teacher)
    rows = torch.randint(bench.vocab, (1, bench.length + 1), device=bench.device)
    places = torch.arange(bench.length, device=bench.device)[None]
    batch = {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous(), "position_ids": places,
             "loss_mask": torch.ones(places.shape, device=bench.device)}  # fmt: skip

    def one(iterator: Any, chunk: Any) -> Any:
        return forward(chunk, next(iterator)), lambda loss: (loss.mean(), {"loss": loss.detach().mean()})

    def run() -> None:
        student.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=one, data_iterator=iter([batch]), model=student, num_microbatches=1,
            seq_length=bench.length, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        optimizer.step()

    memory, took = bench.memory(run), bench.seconds(run, 2 if bench.quick else 5)
    theirs, ours = (from_hf(config).flops_per_token(bench.length // 2) for config in configs)
    found = {"layers": layers, "tokens/s": bench.length / took, "MFU": bench.length * (theirs + 3 * ours) / took / PEAK}
    held = None if bench.device == "cpu" else torch.cuda.memory_allocated()
    found |= {"bytes of a step": memory, "bytes held": held, "student": student_in, "teacher": teacher_in}
    return found | ({"FP8 kernels": fp8_kernels(run)} if engine and "fp8" in student_in + teacher_in else {})


def fp8_kernels(run: Callable[[], object]) -> list[str]:
    """Names of the kernels of a step that are Transformer Engine's or multiply in FP8; or why the profiler refuses."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            run()
    except Exception as error:
        return [f"not profiled: {type(error).__name__}: {error}"[:200]]
    marks = ("transformer_engine", "e4m3", "e5m2", "fp8")
    kernels = [e for e in found.key_averages() if str(e.device_type).endswith("CUDA")]
    return sorted({e.key[:160] for e in kernels if any(mark in e.key.lower() for mark in marks)})


def measured(bench: Bench, save: Callable[[dict[str, Any]], object]) -> None:
    """Part -> its numbers, or the error that ended it; `save` is given all so far after each."""
    import torch

    import nemo_minitron.backend as backend
    from nemo_minitron.nemo.models import start

    engine = not backend.setup().reference
    start()
    print(f"layers: {'Transformer Engine' if engine else 'reference (Transformer Engine is missing: no FP8 is timed)'}")
    found: dict[str, Any] = {"Transformer Engine": engine}
    for name, run in [*losses(bench), *importance(bench), *steps(bench, engine)]:
        began = time.perf_counter()
        try:
            found[name] = run() if began - STARTED < LIMIT else {"error": f"left out: {LIMIT} s were over"}
        except Exception as error:  # the next part may do
            *_, at = traceback.extract_tb(error.__traceback__)
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500], "where": f"{at.filename}:{at.lineno}"}
        found[name]["seconds in all"] = round(time.perf_counter() - began, 1)
        gc.collect()
        if bench.device != "cpu":
            torch.cuda.empty_cache()
        print(f"{name:34}" + "  ".join(f"{key} {_short(value)}" for key, value in found[name].items()), flush=True)
        save(found)


def _short(value: Any) -> str:
    value = f"({len(value)})" if isinstance(value, list) else value
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="pico sizes")
    parser.add_argument("--out", type=Path, help="the JSON; benchmarks/results/DATE_gpu.json where nothing is given")
    arguments = parser.parse_args()
    import torch

    gpu = arguments.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --device cpu --quick runs every part at pico sizes")
    facts = common.machine(PACKAGES) | {"device": torch.cuda.get_device_name() if gpu else "CPU"}
    today, command = datetime.date.today().isoformat(), " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])
    result = {"command": command, "machine": facts, "date": today}
    out = arguments.out or RESULTS / f"{today}_gpu.json"
    bench = Bench(arguments.device, arguments.quick)
    measured(bench, lambda found: out.write_text(json.dumps(result | {"found": found}, indent=1) + "\n"))
    print(out)


if __name__ == "__main__":
    main()
