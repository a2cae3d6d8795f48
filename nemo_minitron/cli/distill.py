"""`minitron distill`: a student learns from its teacher's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.cli.options import Data, Dp, Length, Precision, Seed, Sp, Tp


def distill(
    student: Annotated[str, typer.Argument(help="Hugging Face folder of the pruned student.")],
    teacher: Annotated[str, typer.Option("--teacher", help="Hugging Face folder, hub id or NeMo checkpoint.")],
    data: Data,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of all steps together.")],
    out: Annotated[Path, typer.Option("--out", help="The distilled Hugging Face folder.")],
    sequence_length: Length = 512,
    global_batch_size: Annotated[int, typer.Option("--global-batch-size")] = 1,
    micro_batch_size: Annotated[int, typer.Option("--micro-batch-size")] = 1,
    learning_rate: Annotated[float, typer.Option("--learning-rate")] = 3e-4,
    precision: Precision = "bf16",
    save_every: Annotated[int, typer.Option("--save-every", help="Steps between checkpoints.")] = 100,
    tp: Tp = 1,
    dp: Dp = 1,
    sp: Sp = False,
    seed: Seed = 1234,
) -> None:
    """Retrain a student from the teacher's logits; run again after a kill, it goes on."""
    from nemo_minitron.job import Distillation, Layout
    from nemo_minitron.job.commands.distill import run_distill
    from nemo_minitron.job.precision import settle

    settings = Distillation(
        tokens=tokens, sequence_length=sequence_length, global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size, learning_rate=learning_rate, min_learning_rate=learning_rate / 10,
        warmup_steps=10, precision=settle(precision), save_every=save_every, seed=seed,
    )  # fmt: skip
    run_distill(student, teacher, data, out, settings, Layout(tp=tp, dp=dp, sp=sp))
    print(f"{out}: distilled on {settings.steps * sequence_length * global_batch_size:,} tokens")
