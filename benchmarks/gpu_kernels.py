"""Finds the best launch settings of the KL's kernels and the fused head on this GPU:
`python benchmarks/gpu_kernels.py`.

8,192 tokens x 128,256 from hidden states of 2,048, in bf16, random; milliseconds are medians of Triton's `do_bench`.
For the kernels it varies the columns and warps of a program, and compares with a copy of as many bytes. For the head it
varies the tokens of a chunk, and compares with its four matrix products alone; it also prints the peak of memory with
both gradients. The constants in the code are the best settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

TOKENS, VOCAB, HIDDEN = 8192, 128_256, 2048
LAUNCHES = [(1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32)]


def ms(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(run, warmup=15, rep=60, return_mode="median")


def random(*shape: int, scale: float = 1.0) -> Any:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).mul_(scale)


def kernels() -> None:
    """One pass reads one of the two logits, or writes the gradient."""
    from nemo_minitron.distillation.losses import _triton, _triton_kernels

    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    copy = 2**31 / ms(lambda: y.copy_(x))  # bytes a millisecond
    student, teacher = random(TOKENS, VOCAB, scale=3.0), random(TOKENS, VOCAB, scale=3.0)
    gradient, whole = torch.empty_like(student), _triton.statistics(student, teacher, 1.0)
    one = student.nbytes / copy
    print(f"copy {copy / 1e9:.2f} TB/s; one pass {one:.3f} ms")
    runs: dict[str, tuple[int, Callable[[], object]]] = {
        "STATISTICS": (2, lambda: _triton.statistics(student, teacher, 1.0)),
        "GRADIENT": (3, lambda: _triton.write_gradient(gradient, student, teacher, 1.0, whole)),
    }
    for name, (passes, run) in runs.items():
        for launch in LAUNCHES:
            setattr(_triton_kernels, name, launch)
            took = ms(run)
            print(f"{name:11} {launch!s:12} {took:7.3f} ms, {passes * one / took:.3f} of a copy", flush=True)


def head() -> None:
    from nemo_minitron.distillation import fused_head

    hidden, teacher_hidden = random(TOKENS, 1, HIDDEN), random(TOKENS, 1, HIDDEN)
    weight, teacher_weight = (random(VOCAB, HIDDEN, scale=3 * HIDDEN**-0.5) for _ in range(2))

    def run() -> None:
        given = [leaf.detach().requires_grad_() for leaf in (hidden, weight)]
        fused_head.fused_forward_kl(*given, teacher_hidden, teacher_weight).mean().backward()

    products = 4 * ms(lambda: [rows @ weight.t() for rows in hidden[:, 0].split(1024)])
    print(f"four matrix products {products:.2f} ms")
    for chunk in (512, 1024, 2048, 4096):
        fused_head.CHUNK["cuda"] = chunk
        run()
        torch.cuda.reset_peak_memory_stats()
        before, took = torch.cuda.memory_allocated(), ms(run)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        print(f"head, chunks of {chunk:5} {took:7.2f} ms, {took / products:.2f} of the products, peak {peak:,.0f} MiB")


if __name__ == "__main__":
    kernels()
    torch.cuda.empty_cache()
    head()
