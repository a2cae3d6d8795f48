"""Measures distillation losses, forward and backward, in one run: ours, those of other libraries, and Liger's.

    python benchmarks/distillation_loss.py [--quick] [--repetitions 3] [--dtypes float32,bfloat16] [--tables 1]
        [--out FILE.json]

1,024 tokens x 49,152 and x 128,256, at TP 1 and 2 (real processes over gloo), one thread a process, random logits.
"from logits": the input is both models' logits. "from hidden states": the input is both models' last hidden states (576
and 448) and heads. Seconds: one process runs all losses in turn. It records processor time, which other jobs disturb
least, and wall time. Memory: a fresh process a loss, the resident peak above what it held with the inputs, less the
head's gradient where there is one; the gradient of the logits counts. Collectives: calls in one rank, with backward.
Liger's loss is left out if it cannot be imported. Heads in bf16 are left out if the processor does not multiply in bf16
(there one takes minutes). The mean of each loss over tokens is recorded, because all must agree. Tables that are in
FILE are kept, so that a run resumes; `--tables`: the run ends after so many new ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

TOKENS, TEACHER_HIDDEN, STUDENT_HIDDEN = 1024, 576, 448
IN_PLACE = "ours, in place"  # the gradient overwrites the logits, so each run needs its own copy
FROM_LOGITS = ("modelopt", "NeMo", "F.kl_div", "ours", IN_PLACE)
FROM_HIDDEN = ("head, modelopt", "head, ours", "fused head", "Liger")
ONE_RANK = ("F.kl_div", "Liger")  # they cannot work on shards


# -- in a process of its own, or one a rank --------------------------------------------------------------
def worker(task: dict[str, Any]) -> Any:
    """Times the losses named, or measures the memory of one."""
    import torch

    torch.set_num_threads(1)
    group = _start(task["tp"])
    calls = _count_collectives()
    losses = {name: _loss(name, task["dtype"], group) for name in task["losses"]}
    for run in losses.values():  # small inputs, to load libraries and fill caches
        run(inputs(64, 640 // task["tp"], task["dtype"], task["losses"]))
    width = task["vocab"] // task["shrink"] // task["tp"]
    given = inputs(TOKENS // task["shrink"], width, task["dtype"], task["losses"])
    counts, values = {}, {}
    spent = [given["student"].clone() for _ in range(task["repetitions"] + 1)] if IN_PLACE in task["losses"] else []

    def once(name: str) -> None:
        calls.clear()
        values[name] = losses[name](given | {"student": spent.pop()} if name == IN_PLACE else given)
        counts[name] = len(calls)

    runs = {name: lambda name=name: once(name) for name in losses}
    if task["kind"] == "memory":
        peaks = common.resident_peaks(runs)
        head = given["weight"].nbytes / 2**20 if "weight" in given else 0
        return {name: round(mib - head, 1) for name, mib in peaks.items()}  # one loss a process
    rows = common.summary(common.interleaved(runs, task["repetitions"]), next(iter(losses)))
    return {name: row | {"collectives": counts[name], "loss": values[name]} for name, row in rows.items()}


def _start(tp: int) -> Any:
    """Initialises Megatron's groups, which the other libraries use. Returns the tensor-parallel group."""
    import torch

    import nemo_minitron.backend as backend

    backend.setup()
    from megatron.core import parallel_state

    if tp > 1:
        torch.distributed.init_process_group("gloo")
    else:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    return parallel_state.get_tensor_model_parallel_group()


def _count_collectives() -> list[str]:
    import torch

    calls: list[str] = []
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"):
        real = getattr(torch.distributed, name)

        def count(*given: Any, _real: Any = real, _name: str = name, **more: Any) -> Any:
            calls.append(_name)
            return _real(*given, **more)

        setattr(torch.distributed, name, count)
    return calls


def inputs(tokens: int, width: int, dtype: str, losses: list[str]) -> dict[str, Any]:
    """The inputs of these losses: logits [tokens, 1, width] of both models; hidden states and heads that give such
    logits."""
    import torch

    generator = torch.Generator().manual_seed(torch.distributed.get_rank())  # each rank has its own columns
    same = torch.Generator().manual_seed(7)

    def random(*shape: int, scale: float = 1.0, of: Any = generator) -> Any:
        return torch.randn(*shape, generator=of).mul_(scale).to(getattr(torch, dtype))

    tensors = {}
    if set(losses) & set(FROM_LOGITS):  # 64 tokens, repeated: quick to make, and as slow to read
        for name in ("student", "teacher"):
            tensors[name] = random(64, 1, width, scale=3).repeat(tokens // 64, 1, 1)
    if set(losses) & set(FROM_HIDDEN):
        for name, size in (("", STUDENT_HIDDEN), ("teacher_", TEACHER_HIDDEN)):
            tensors[f"{name}hidden"] = random(tokens, 1, size, of=same)
            tensors[f"{name}weight"] = random(width, size, scale=3 * size**-0.5)
    return tensors


def _loss(name: str, dtype: str, group: Any) -> Callable[[dict[str, Any]], float]:
    """inputs -> the mean loss, after forward and backward; gradients are freed when the function ends."""
    if name in FROM_LOGITS:
        of = _of_logits(name, group)

        def run(given: dict[str, Any]) -> float:
            leaf = given["student"].detach().requires_grad_()
            # Only logits that are no leaf can be overwritten, so this takes a view. The logits are lost afterwards.
            logits = leaf.view_as(leaf) if name == IN_PLACE else leaf
            loss = of(logits, given["teacher"]).mean()
            loss.backward()
            return float(loss)

        return run
    of = _of_hidden(name, group)

    def run_hidden(given: dict[str, Any]) -> float:
        hidden, weight = (given[key].detach().requires_grad_() for key in ("hidden", "weight"))
        loss = of(hidden, weight, given["teacher_hidden"], given["teacher_weight"]).mean()
        loss.backward()
        return float(loss)

    return run_hidden


def _of_logits(name: str, group: Any) -> Callable[..., Any]:
    import torch
    from torch.nn.functional import kl_div, log_softmax

    from nemo_minitron.distillation.losses import forward_kl

    if name == "modelopt":
        from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

        return lambda s, t: LogitsKLLoss(_config())(s, t)[0]
    if name == "NeMo":
        from nemo.collections.llm.modelopt.distill.loss import LogitsKLLoss as NeMoLoss

        return lambda s, t: NeMoLoss(_config())(s, t)[0]
    if name == "F.kl_div":
        return lambda s, t: kl_div(
            log_softmax(s, -1, torch.float32), log_softmax(t, -1, torch.float32), reduction="none", log_target=True
        ).sum(-1)
    return lambda s, t: forward_kl(s, t, group=group, in_place=name == IN_PLACE)


def _config() -> Any:
    """The two fields that the other libraries read."""
    from types import SimpleNamespace

    from megatron.core import parallel_state

    size = parallel_state.get_tensor_model_parallel_world_size()
    return SimpleNamespace(tensor_model_parallel_size=size, sequence_parallel=False)


def _of_hidden(name: str, group: Any) -> Callable[..., Any]:
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    from nemo_minitron.distillation import fused_head

    if name == "fused head":
        return lambda *given: fused_head.fused_forward_kl(*given, group=group)
    if name == "Liger":
        return _liger
    loss = _of_logits(name.removeprefix("head, "), group)
    return lambda h, w, th, tw: loss(copy_to_tensor_model_parallel_region(h) @ w.t(), th @ tw.t())


def _liger(hidden: Any, weight: Any, teacher_hidden: Any, teacher_weight: Any) -> Any:
    """beta 0 is the forward KL; chunks of as many tokens as the fused head's; no hard labels."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    from nemo_minitron.distillation import fused_head

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=False, chunk_size=fused_head.CHUNK[hidden.device.type])
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    return loss(hidden.flatten(0, 1), weight, teacher_hidden.flatten(0, 1), teacher_weight, labels)


# -- the parent ------------------------------------------------------------------------------------------
def measure(dtype: str, vocab: int, tp: int, repetitions: int, shrink: int) -> dict[str, Any]:
    names = [n for n in _names(dtype) if tp == 1 or n not in ONE_RANK]
    task = {"dtype": dtype, "vocab": vocab, "tp": tp, "repetitions": repetitions, "shrink": shrink}
    seconds = _run(task | {"kind": "time", "losses": names}, {})
    rows = {}
    for name in names:
        memory = _run(task | {"kind": "memory", "losses": [name]}, common.EXACT_HEAP)
        rows[name] = seconds[name] | {"MiB": memory[name]}
    return rows


def _names(dtype: str) -> tuple[str, ...]:
    from nemo_minitron.settings.precision import best_precision

    heads = FROM_HIDDEN if dtype == "float32" or best_precision() == "bf16" else ()
    return FROM_LOGITS + tuple(name for name in heads if name != "Liger" or _has_liger())


def _has_liger() -> bool:
    done = subprocess.run([sys.executable, "-c", "import liger_kernel.chunked_loss"], capture_output=True)
    return done.returncode == 0


def _run(task: dict[str, Any], heap: dict[str, str]) -> Any:
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={task['tp']}"] if task["tp"] > 1 else []
    environment = os.environ | heap | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *start, __file__, "--worker", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{task}\n{done.stderr[-3000:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


def table(rows: dict[str, Any], title: str) -> None:
    heads = f"{'CPU s':>8}{'wall s':>8}{'MiB':>9}{'collectives':>13}{'time':>8}{'memory':>8}"
    print(f"\n{title}\n{'':18}{heads} (both over modelopt's)")
    base = rows["modelopt"]
    for name, row in rows.items():
        seconds = f"{row['cpu'][0]:8.3f}{row['wall'][0]:8.3f}"
        shares = f"{row['cpu'][0] / base['cpu'][0]:8.3f}{row['MiB'] / base['MiB']:8.3f}"
        print(f"{name:18}{seconds}{row['MiB']:9.1f}{row['collectives']:>13}{shares}", flush=True)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="an eighth of tokens and vocabulary: does it run?")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--tables", type=int, default=8, help="most new tables in this run")
    parser.add_argument("--out", type=Path, default=common.dated("distillation_loss"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        task = json.loads(options.worker)
        rows_of_worker = worker(task)
        if os.environ.get("RANK", "0") == "0":
            print("RESULT " + json.dumps(rows_of_worker))
        return
    packages = ("torch", "megatron-core", "nvidia-modelopt", "nemo_toolkit", *(["liger-kernel"] * _has_liger()))
    before = json.loads(options.out.read_text())["rows"] if options.out.exists() and not options.quick else {}
    result = common.heading(packages) | {"tokens": TOKENS, "rows": (rows := before)}
    missing = [
        (title, (dtype, vocab, tp))
        for dtype, vocab, tp in itertools.product(options.dtypes.split(","), (49_152, 128_256), (1, 2))
        if (title := f"{dtype}, {TOKENS} x {vocab}, TP {tp}") not in rows
    ]
    for title, of in missing[: options.tables]:
        rows[title] = measure(*of, options.repetitions, 8 if options.quick else 1)
        table(rows[title], title)
        if not options.quick:
            common.write(result, options.out)


if __name__ == "__main__":
    main()
