"""Measures importance: a plain forward pass, ours, and NVIDIA's Model Optimizer, on the same Megatron models and
batches.

    python benchmarks/importance.py [--quick] [--models local] [--repetitions 9] [--out FILE.json]

`smollm2`: demo/smollm2-135m-instruct on the reference layers, which Model Optimizer does not support. `local`: the same
sizes, random, on Megatron's local layers with LayerNorm, which it supports. fp32, one thread, batches of 1 x 512 tokens
of demo/wikipedia. Seconds: one process a model, with the loops in turn. Memory: a new process for each loop, and the
resident peak above the memory of the process with the model loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

SMOLLM2 = {
    "num_layers": 30, "hidden_size": 576, "ffn_hidden_size": 1536, "num_attention_heads": 9, "num_query_groups": 3,
    "kv_channels": 64, "vocab_size": 49152, "sequence_length": 512,
}  # fmt: skip
PICO = {
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 6, "num_query_groups": 3,
    "kv_channels": 16, "vocab_size": 509, "sequence_length": 64,
}  # fmt: skip
AXES = ("ffn", "heads", "norms", "layers")  # all width axes of a dense model, and block influence
NINE = [f"{batch},{sequence}" for batch in ("mean", "l2", "var") for sequence in ("mean", "l2", "var")]
LOOPS = {"smollm2": ("plain", "ours", "ours, nine criteria"), "local": ("plain", "ours", "modelopt")}
LOOPS["pico"] = (*LOOPS["local"], "ours, nine criteria")
TIMED, COUNTS = 2, (4, 16)  # batches a repetition; batches for the memory


# -- in a process of its own ---------------------------------------------------------------------------
def worker(task: dict[str, Any]) -> Any:
    """Times all loops, or measures the memory of one."""
    import torch

    import nemo_minitron.backend as backend

    backend.setup()
    torch.set_num_threads(1)
    if task["kind"] == "time":
        loops = {name: loop(task["model"], name) for name in LOOPS[task["model"]]}
        batches = tokens(task["model"], TIMED)
        run = {name: lambda f=f: f(batches) for name, f in loops.items()}
        rows = common.summary(common.interleaved(run, task["repetitions"]), "plain")
        return {"seconds": rows, "extra_ms": common.by_operation(run, "plain")}
    function, batches = loop(task["model"], task["loop"]), tokens(task["model"], max(COUNTS))
    return common.resident_peaks({str(n): lambda n=n: function(batches[:n]) for n in COUNTS})


_models: dict[str, Any] = {}


def model_of(name: str) -> Any:
    """The model, built once in a process."""
    if name not in _models:
        _models[name] = _smollm2() if name == "smollm2" else _local(name)
    return _models[name]


def _smollm2() -> Any:
    from nemo_minitron.backend.wrappers import unwrap
    from nemo_minitron.nemo import load_model

    chunks = load_model(common.MODEL)
    return unwrap(chunks[0] if isinstance(chunks, list) else chunks).eval()


def _local(name: str) -> Any:
    import peer
    import torch

    if not torch.distributed.is_initialized():
        peer.one_process()
    return peer.local_model(**(PICO if name == "pico" else SMOLLM2), seed=0)


def loop(name: str, kind: str) -> Callable[[Any], object]:
    """A function of batches. Model Optimizer converts a model in place, so it gets a second, equal one."""
    import peer

    from nemo_minitron.importance import estimate

    if kind == "modelopt":
        converted = peer.convert(_local(name))
        return lambda batches: peer.forward(converted, batches)
    model = model_of(name)
    if kind == "plain":
        return lambda batches: peer.forward(model, batches)
    criterion: Any = NINE if "nine" in kind else "l2,mean"
    return lambda batches: estimate(model, batches, criterion=criterion, axes=AXES)


def tokens(name: str, count: int) -> list[Any]:
    """`count` batches of one row, int64 [1, sequence], from the start of the corpus."""
    import torch

    sizes = PICO if name == "pico" else SMOLLM2
    length = sizes["sequence_length"]
    if name == "pico":
        ids = torch.randint(sizes["vocab_size"], (count * length,), generator=torch.Generator().manual_seed(0))
        return list(ids.view(count, 1, length))
    return list(common.token_rows(common.MODEL, common.TEXT / "train.jsonl", count, length)[:, None])


# -- all of it -----------------------------------------------------------------------------------------
def measured(task: dict[str, Any]) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= common.EXACT_HEAP if task["kind"] == "memory" else {}
    command = [sys.executable, "-W", "ignore", __file__, "--worker", json.dumps(task)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr[-3000:])
    return json.loads(run.stdout.splitlines()[-1])


def benchmark(model: str, repetitions: int) -> dict[str, Any]:
    numbers: dict[str, Any] = measured({"kind": "time", "model": model, "repetitions": repetitions})
    numbers["memory"] = {kind: measured({"kind": "memory", "model": model, "loop": kind}) for kind in LOOPS[model]}
    return numbers


def show(model: str, numbers: dict[str, Any]) -> None:
    counts = "".join(f"{f'MiB, {n} batches':>17}" for n in COUNTS)
    print(f"\n{model:20}{'wall s':>22}{'CPU s':>22}{'of the plain forward':>24}{'by least':>10}{counts}")
    for kind, row in numbers["seconds"].items():
        spread = [common.with_range(row[key]) for key in ("wall", "cpu", "ratio")]
        memory = "".join(f"{numbers['memory'][kind][str(n)]:>17.1f}" for n in COUNTS)
        print(f"{kind:20}{spread[0]:>22}{spread[1]:>22}{spread[2]:>24}{row['least'][0]:>10.3f}{memory}")
    for kind, operations in numbers["extra_ms"].items():
        print(f"  {kind}, ms more than plain: " + ", ".join(f"{name} {ms}" for name, ms in operations.items()))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a pico model, as a smoke test")
    parser.add_argument("--models", default="smollm2,local", help="smollm2, local or both, with a comma")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print("\n" + json.dumps(worker(arguments.worker)))
        return
    models = ["pico"] if arguments.quick else arguments.models.split(",")
    result = everything(models, arguments.repetitions)
    common.write(result, arguments.out)


def everything(models: list[str], repetitions: int) -> dict[str, Any]:
    result: dict[str, Any] = common.heading(("torch", "megatron-core", "nvidia-modelopt")) | {"models": {}}
    print(f"{result['command']}\n{result['machine']}")
    print(f"{repetitions} repetitions of {TIMED} batches: median (least-most); fp32, one thread")
    print("MiB: resident peak beyond the loaded model")
    result |= {"batches": TIMED, "repetitions": repetitions, "columns": ["median", "least", "most"]}
    for model in models:
        result["models"][model] = benchmark(model, repetitions)
        show(model, result["models"][model])
    return result


if __name__ == "__main__":
    main()
