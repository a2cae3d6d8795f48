"""The distillation steps of `gpu.py`: pairs of shapes in each precision, and the time of the parts of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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


def config_of(shape: tuple[int, ...], extra: dict[str, Any], vocab: int, layers: int | None = None) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = {**LLAMA, **dict(zip(names, shape, strict=True)), "vocab_size": vocab, **extra}
    return config | ({"num_hidden_layers": layers} if layers else {})


def model(config: dict[str, Any], precision: str, training: bool) -> Any:
    import torch

    from nemo_minitron.hosts.nemo.models import build, nemo_config
    from nemo_minitron.job import Layout

    built = build(nemo_config(config, precision=precision, training=training), Layout())[0]
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.02)
    return built


def layers_that_fit(bench: Any, name: str) -> int:
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


def steps(bench: Any, engine: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for name in bench.shapes:
        for how, precisions in STEPS.items():
            if engine or bench.quick or how == "bf16":
                yield f"step: {name}, {how}", lambda name=name, p=precisions: step(bench, name, *p, engine)


def step(bench: Any, name: str, student_in: str, teacher_in: str, engine: bool) -> dict[str, Any]:
    """Tokens a second and memory of the distillation step; if both precisions are equal, also its time over that of its
    parts."""
    import torch
    from short_training import batch_of, in_ddp, train_step

    from nemo_minitron.distillation.step import Objective, distillation_step
    from nemo_minitron.distillation.teacher import Teacher
    from nemo_minitron.families import from_hf
    from nemo_minitron.hosts.nemo.distill import model_inputs

    extra, *pair = bench.shapes[name]
    layers = layers_that_fit(bench, name)
    configs = [config_of(shape, extra, bench.vocab, layers) for shape in pair]
    teacher = Teacher([model(configs[0], teacher_in, False)], model_inputs)
    student, optimizer = in_ddp(model(configs[1], student_in, True), "bf16")
    batch = batch_of(torch.randint(bench.vocab, (bench.length + 1,), device=bench.device))
    online = distillation_step(Objective(bench.vocab), model_inputs, teacher)

    def distil() -> None:
        train_step(online, student, optimizer, batch)

    memory, count = bench.memory(distil), 2 if bench.quick else 5
    seconds = bench.seconds(distil, count)
    theirs, ours = (from_hf(config).flops_per_token(bench.length // 2) for config in configs)
    row = {
        "layers": layers,
        "tokens/s": bench.length / seconds,
        "MFU": bench.length * (theirs + 3 * ours) / seconds / PEAK,
    }
    bytes_held = None if bench.device == "cpu" else torch.cuda.memory_allocated()
    row |= {"bytes of a step": memory, "bytes held": bytes_held, "student": student_in, "teacher": teacher_in}
    if student_in == teacher_in:
        alone = torch.no_grad()(lambda: teacher.logits(teacher.hidden(batch)))
        lm = lambda m, b: m(**model_inputs(b), labels=b["labels"])  # noqa: E731
        row["teacher s"] = bench.seconds(alone, count)
        row["LM step s"] = bench.seconds(lambda: train_step(lm, student, optimizer, batch), count)
        row["over both"] = seconds / (row["teacher s"] + row["LM step s"])
    return row | ({"FP8 kernels": fp8_kernels(distil)} if engine and "fp8" in student_in + teacher_in else {})


def fp8_kernels(run: Callable[[], object]) -> list[str]:
    """Names of a step's kernels that belong to Transformer Engine or multiply in FP8, or the error of the profiler."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            run()
    except Exception as error:
        return [f"not profiled: {type(error).__name__}: {error}"[:200]]
    marks = ("transformer_engine", "e4m3", "e5m2", "fp8")
    kernels = [e for e in found.key_averages() if str(e.device_type).endswith("CUDA")]
    return sorted({e.key[:160] for e in kernels if any(mark in e.key.lower() for mark in marks)})
