"""The distillation steps of `gpu.py`: pairs of shapes in each precision, the parts of a step, its memory beside the dry
run's, and a teacher that lies in the CPU's memory between steps."""

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
LARGE = {"Llama-3.1-70B": ({}, (8192, 28672, 80, 64, 8), (6144, 20480, 80, 64, 8))}  # by layers only
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


class Pair:
    """A teacher of a shape with its cut student, random, and a distillation step on one batch."""

    def __init__(self, bench: Any, name: str, student_in: str, teacher_in: str, offload: bool = False) -> None:
        import torch
        from short_training import batch_of, in_ddp, train_step

        from nemo_minitron.distillation.step import Objective, distillation_step
        from nemo_minitron.distillation.teacher import Teacher
        from nemo_minitron.hosts.nemo.distill import model_inputs

        extra, *shapes = bench.shapes[name]
        self.bench, self.layers = bench, layers_that_fit(bench, name)
        self.configs = [config_of(shape, extra, bench.vocab, self.layers) for shape in shapes]
        self.teacher = Teacher([model(self.configs[0], teacher_in, False)], model_inputs, offload=offload)
        self.student, self.optimizer = in_ddp(model(self.configs[1], student_in, True), "bf16")
        self.batch = batch_of(torch.randint(bench.vocab, (bench.length + 1,), device=bench.device))
        self.precisions = {"precision": student_in, "teacher_precision": teacher_in}
        online = distillation_step(Objective(bench.vocab), model_inputs, self.teacher)
        inputs, self.count = model_inputs, 2 if bench.quick else 5
        self.forward = torch.no_grad()(lambda: self.teacher.logits(self.teacher.hidden(self.batch)))
        self.distil = lambda: train_step(online, self.student, self.optimizer, self.batch)
        lm = lambda m, b: m(**inputs(b), labels=b["labels"])  # noqa: E731
        self.lm_step = lambda: train_step(lm, self.student, self.optimizer, self.batch)

    def held(self) -> int | None:
        """Bytes of the GPU's memory that are held between two steps."""
        import torch

        return None if self.bench.device == "cpu" else torch.cuda.memory_allocated()

    def dry_run(self) -> int:
        """Bytes of a step, as the dry run adds them up."""
        from nemo_minitron.costs import training_memory
        from nemo_minitron.families import from_hf
        from nemo_minitron.job import Layout

        teacher, student = map(from_hf, self.configs)
        settings = {"batch": 1, "context": self.bench.length, "teacher": teacher, **self.precisions}
        return sum(training_memory(student, Layout(), micro_batches=1, **settings).values())

    def flops(self) -> int:
        """FLOPs of a token: the teacher's forward pass, the student's forward and backward pass."""
        from nemo_minitron.families import from_hf

        theirs, ours = (from_hf(config).flops_per_token(self.bench.length // 2) for config in self.configs)
        return theirs + 3 * ours


def step(bench: Any, name: str, student_in: str, teacher_in: str, engine: bool) -> dict[str, Any]:
    """Tokens a second and memory of the distillation step, beside the dry run's; if both precisions are equal, also its
    time over that of its parts."""
    pair = Pair(bench, name, student_in, teacher_in)
    memory, seconds = bench.memory(pair.distil), bench.seconds(pair.distil, pair.count)
    row = {
        "layers": pair.layers, "tokens/s": bench.length / seconds, "MFU": bench.length * pair.flops() / seconds / PEAK,
        "bytes of a step": memory, "bytes held": pair.held(), "bytes in the dry run": pair.dry_run(),
        "student": student_in, "teacher": teacher_in,
    }  # fmt: skip
    if memory is not None:
        row["measured over the dry run"] = (memory + row["bytes held"]) / row["bytes in the dry run"]
    if student_in == teacher_in:
        row["teacher s"] = bench.seconds(pair.forward, pair.count)
        row["LM step s"] = bench.seconds(pair.lm_step, pair.count)
        row["over both"] = seconds / (row["teacher s"] + row["LM step s"])
    return row | ({"FP8 kernels": fp8_kernels(pair.distil)} if engine and "fp8" in student_in + teacher_in else {})


def teachers(bench: Any) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for name in bench.shapes:
        yield f"teacher in the CPU's memory: {name}", lambda name=name: offloaded(bench, name)


def offloaded(bench: Any, name: str) -> dict[str, Any]:
    """A step whose teacher lies in the CPU's memory between steps (`offload_teacher`), over one whose teacher stays."""
    pair = Pair(bench, name, "bf16", "bf16", offload=True)
    away = pair.held()

    def there_and_back() -> None:
        pair.teacher.come()
        pair.distil()
        pair.teacher.leave()

    moved = bench.seconds(there_and_back, pair.count)
    pair.teacher.come()
    stays = bench.seconds(pair.distil, pair.count)
    row = {"layers": pair.layers, "moved s": moved, "stays s": stays, "ratio": moved / stays}
    return row | {"bytes held while it is away": away, "bytes held": pair.held()}


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
