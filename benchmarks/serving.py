"""Requests a second of a teacher and its student, at given input and output lengths, in bf16 and FP8:
`python benchmarks/serving.py TEACHER STUDENT [--input 512] [--output 128] [--requests 32] [--precision bf16,fp8]
[--engine auto|vllm|tensorrt_llm|transformers] [--repeat 3] [--out FILE.json]`.

All requests arrive at once, with random tokens (seed 0), and each ends at the output length. `auto` is the first engine
that is installed. transformers is the fallback that runs anywhere: one padded batch, in bf16 only; it compares shapes,
not servers. TensorRT-LLM reads FP8 from MODEL-fp8 (`minitron serving MODEL --precision fp8` says how).
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

from nemo_minitron.export.serving import QUANTISED
from nemo_minitron.families import from_hf

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], None]


def with_transformers(model: str, precision: str) -> Generate:
    import torch
    from transformers import GenerationConfig

    from nemo_minitron.evaluation.model import load

    loaded = load(model, precision)

    def generate(prompts: Prompts, output: int) -> None:
        loaded.generation_config = GenerationConfig(
            max_new_tokens=output, min_new_tokens=output, do_sample=False, pad_token_id=0
        )
        ids = torch.tensor(prompts, device=loaded.device)
        with torch.inference_mode():
            rows = loaded.generate(ids, attention_mask=torch.ones_like(ids))
        assert rows.shape == (len(prompts), len(prompts[0]) + output)

    return generate


def with_vllm(model: str, precision: str) -> Generate:
    from vllm import LLM, SamplingParams

    quantised = {"quantization": "fp8"} if precision == "fp8" else {}
    engine = LLM(model=model, dtype="bfloat16", enable_prefix_caching=False, **quantised)

    def generate(prompts: Prompts, output: int) -> None:
        settings = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)

    return generate


def with_tensorrt_llm(model: str, precision: str) -> Generate:
    from tensorrt_llm import LLM, SamplingParams
    from tensorrt_llm.llmapi import KvCacheConfig

    folder = model + (QUANTISED if precision == "fp8" else "")
    engine = LLM(model=folder, kv_cache_config=KvCacheConfig(enable_block_reuse=False))

    def generate(prompts: Prompts, output: int) -> None:
        engine.generate(prompts, SamplingParams(max_tokens=output, ignore_eos=True), use_tqdm=False)

    return generate


ENGINES = {"tensorrt_llm": with_tensorrt_llm, "vllm": with_vllm, "transformers": with_transformers}


def measured(generate: Generate, prompts: Prompts, output: int, repeat: int) -> list[float]:
    """Seconds of each repetition, after one run to warm up."""
    generate(prompts, output)
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        generate(prompts, output)
        seconds.append(time.perf_counter() - start)
    return seconds


def row(model: str, precision: str, engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model in one precision; the engine and its memory are freed before the next one is loaded."""
    import numpy as np

    architecture = from_hf(model)
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, architecture.vocab_size, (options.requests, options.input)).tolist()
    seconds = measured(ENGINES[engine](model, precision), prompts, options.output, options.repeat)
    rate = options.requests / statistics.median(seconds)
    return {
        "model": model, "precision": precision, "parameters": architecture.parameters(), "requests_a_second": rate,
        "tokens_a_second": rate * options.output, "seconds": seconds,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rates, each also relative to the teacher's in the same precision."""
    base = {r["precision"]: r["requests_a_second"] for r in rows[::-1] if r["model"] == rows[0]["model"]}
    lines = [f"{'model':40}{'precision':>10}{'parameters':>16}{'requests/s':>12}{'tokens/s':>12}{'speed':>8}"]
    for r in rows:
        rate = r["requests_a_second"]
        lines.append(
            f"{r['model'][-39:]:40}{r['precision']:>10}{r['parameters']:>16,}{rate:>12.3f}"
            f"{r['tokens_a_second']:>12.1f}{rate / base[r['precision']]:>8.2f}"
        )
    return "\n".join(lines)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("teacher")
    parser.add_argument("student")
    for name, default in (("input", 512), ("output", 128), ("requests", 32), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", default="bf16,fp8")
    parser.add_argument("--engine", choices=("auto", *ENGINES), default="auto")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parsed(arguments)
    engine = options.engine
    if engine == "auto":
        engine = next(name for name in ENGINES if importlib.util.find_spec(name))
    precisions = options.precision.split(",")
    if engine == "transformers" and "fp8" in precisions:
        print("transformers runs no FP8 here; it needs vLLM or TensorRT-LLM, and is left out")
        precisions.remove("fp8")
    rows = [row(model, p, engine, options) for p in precisions for model in (options.teacher, options.student)]
    print(f"{engine}: {options.requests} requests at once, {options.input} tokens in, {options.output} out")
    print(table(rows))
    settings = {name: getattr(options, name) for name in ("input", "output", "requests", "repeat")}
    packages = ("torch", "transformers", *([engine] if engine != "transformers" else []))
    common.write({**common.heading(packages), "engine": engine, **settings, "rows": rows}, options.out)
    return rows


if __name__ == "__main__":
    main()
