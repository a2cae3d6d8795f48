"""Measures the effect of emulated FP8 on scores, kept sets, a teacher's logits and a student's loss.

    python benchmarks/fp8_emulation.py [--samples 16] [--rows 8] [--steps 12] [--threads 1] [--out FILE.json]

The model is demo/smollm2-135m-instruct on the reference layers, the text demo/wikipedia: calibration and training from
its train split, the KL on its test split. Each FP8 precision (`backend/fp8.py`) is compared with bf16. fp32 is compared
with bf16 too, which shows the error of bf16 itself. Scores: the mean over layers of Spearman's rank correlation, and
the share of the kept set that both calibrations keep (ffn 1536 -> 1024, one head of each group of three dropped, hidden
576 -> 448). Teacher: mean forward KL(bf16 || precision) a token, nats, and top-1 agreement. Student: cut by the bf16
scores to ffn 1024, distilled from the bf16 teacher in each precision: same batches, same seed, its loss at each step.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import common
from common import MODEL, TEXT
from short_training import batch_of, in_ddp, train_step

PRECISIONS = ("bf16", "fp32", "fp8-delayed", "fp8-current", "fp8-blockwise")
KEEP = {"ffn": 1024, "heads": 6, "hidden": 448}


def compared(ours: Any, theirs: Any) -> dict[str, dict[str, float]]:
    """Rank correlation and overlap of the kept sets of two calibrations, for each axis."""
    import numpy as np
    from scipy.stats import spearmanr

    from nemo_minitron.search import plan

    by_axis = {}
    for axis, size in KEEP.items():
        a, b = (np.atleast_2d(scores[axis]) for scores in (ours, theirs))
        kept = [plan(scores, keep={axis: size}).keep[axis] for scores in (ours, theirs)]
        sets = [[set(k)] if axis == "hidden" else [set(k[layer]) for layer in sorted(k)] for k in kept]
        by_axis[axis] = {
            "rank correlation": float(np.mean([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])),
            "overlap": float(np.mean([len(x & y) / len(x) for x, y in zip(*sets, strict=True)])),
        }
    return by_axis


def logits_of(model: Any, batch: Any) -> Any:
    """fp32 [B, S, V] of tokens [B, S]."""
    import torch

    positions = torch.arange(batch.shape[1])[None].expand_as(batch)
    with torch.no_grad():
        return model(batch, positions, None).float()


def divergence(reference: Any, model: Any, text: Any) -> dict[str, float]:
    """Mean over tokens of KL(reference || model), and the share of tokens where both prefer the same next token."""
    import torch

    total, same, tokens = 0.0, 0, 0
    for row in text[:, :-1]:
        p, q = (logits_of(each, row[None])[0].log_softmax(-1) for each in (reference, model))
        total += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += row.numel()
    del p, q
    assert torch.isfinite(torch.tensor(total))
    return {"KL": total / tokens, "top-1 agreement": same / tokens}


def losses(plan: Any, precision: str, teacher: Any, text: Any, steps: int) -> list[float]:
    """The distillation loss at each of `steps` steps of one row."""
    from nemo_minitron.distillation.step import Objective, distillation_step
    from nemo_minitron.hosts.nemo.distill import model_inputs
    from nemo_minitron.hosts.nemo.models import load_model

    student, optimizer = in_ddp(load_model(MODEL, plan, precision=precision)[0], "bf16", 1e-4)
    forward = distillation_step(Objective(plan.target.vocab_size), model_inputs, teacher)
    rows = itertools.islice(itertools.cycle(text), steps)
    return [round(float(train_step(forward, student, optimizer, batch_of(row))), 4) for row in rows]


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    import nemo_minitron.backend as backend
    from nemo_minitron.distillation.teacher import Teacher
    from nemo_minitron.hosts.nemo.distill import model_inputs
    from nemo_minitron.hosts.nemo.models import load_model
    from nemo_minitron.importance import estimate
    from nemo_minitron.search import plan

    backend.setup()
    torch.set_num_threads(arguments.threads)
    length, results = arguments.sequence_length, {name: {} for name in PRECISIONS}  # type: Any, dict[str, Any]
    train = common.token_rows(MODEL, TEXT / "train.jsonl", arguments.samples + arguments.steps, length + 1)
    test = common.token_rows(MODEL, TEXT / "test.jsonl", arguments.rows, length + 1)
    batches = train[: arguments.samples, :-1].split(2)
    reference, base = load_model(MODEL, precision="bf16")[0].eval(), None
    for name in PRECISIONS:
        model = reference if name == "bf16" else load_model(MODEL, precision=name)[0].eval()
        scores = estimate(model, list(batches))
        base = base or scores
        results[name] |= {"scores": compared(base, scores), "teacher": divergence(reference, model, test)}
        print(name, json.dumps(results[name]), flush=True)
    teacher, cut = Teacher([reference], model_inputs), plan(base, keep={"ffn": KEEP["ffn"]})
    for name in PRECISIONS if arguments.steps else ():
        if name != "fp32":  # its optimizer keeps no master copies, so it is not comparable
            results[name]["student"] = losses(cut, name, teacher, train[arguments.samples :], arguments.steps)
            print(name, results[name]["student"], flush=True)
    return results


def show(results: dict[str, Any]) -> None:
    heads = [f"{axis} {what}" for axis in KEEP for what in ("rank", "kept")]
    columns = "".join(f"{head:>13}" for head in heads) + f"{'KL':>10}{'top-1':>8}{'last loss':>11}"
    print(f"\n{'against bf16':16}{columns}")
    for name, row in results.items():
        numbers = "".join(f"{value:13.4f}" for axis in row["scores"].values() for value in axis.values())
        loss = row.get("student", [float("nan")])[-1]
        print(f"{name:16}{numbers}{row['teacher']['KL']:10.5f}{row['teacher']['top-1 agreement']:8.3f}{loss:11.4f}")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--samples", type=int, default=16, help="calibration rows")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8, help="of held-out text, for the KL")
    parser.add_argument("--steps", type=int, default=12, help="of each student, of one row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    result = common.heading(("torch", "megatron-core"))
    result["found"] = measured(arguments)
    show(result["found"])
    common.write(result, arguments.out)


if __name__ == "__main__":
    main()
