"""`minitron finetune`: a distilled student is aligned, as the papers align theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.cli.options import Cp, Dp, Ep, Length, Pp, Precision, Seed, Sp, Stall, Tp, Vp
from nemo_minitron.launch.stall import SECONDS


def finetune(
    student: Annotated[str, typer.Argument(help="Hugging Face folder, such as a run's student.")],
    data: Annotated[Path, typer.Option("--data", help="JSONL; each row has the texts input and output.")],
    out: Annotated[Path, typer.Option("--out", help="The aligned Hugging Face folder.")],
    steps: Annotated[int, typer.Option("--steps")] = 1000,
    sequence_length: Length = 4096,
    global_batch_size: Annotated[int, typer.Option("--global-batch-size")] = 128,
    micro_batch_size: Annotated[int, typer.Option("--micro-batch-size")] = 1,
    learning_rate: Annotated[float, typer.Option("--learning-rate")] = 1e-5,
    prompt_template: Annotated[str, typer.Option("--prompt-template")] = "{input} {output}",
    precision: Precision = "bf16",
    save_every: Annotated[int, typer.Option("--save-every", help="Steps between checkpoints.")] = 500,
    tp: Tp = 1,
    pp: Pp = 1,
    vp: Vp = 1,
    cp: Cp = 1,
    ep: Ep = 1,
    dp: Dp = 1,
    sp: Sp = False,
    seed: Seed = 1234,
    stall_timeout: Stall = SECONDS,
) -> None:
    """Instruction tuning by NeMo's llm.finetune; run again after a kill, it goes on."""
    from nemo_minitron.commands.finetune import run_finetune
    from nemo_minitron.job import Layout
    from nemo_minitron.settings.finetuning import Finetuning
    from nemo_minitron.settings.precision import resolve_precision

    settings = Finetuning(
        steps=steps, sequence_length=sequence_length, global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size, learning_rate=learning_rate, min_learning_rate=learning_rate / 10,
        warmup_steps=min(50, steps // 10), prompt_template=prompt_template, precision=resolve_precision(precision),
        save_every=save_every, seed=seed,
    )  # fmt: skip
    run_finetune(student, data, out, settings, Layout(tp=tp, pp=pp, vp=vp, cp=cp, ep=ep, dp=dp, sp=sp))
    print(f"{out}: aligned in {steps} steps of {global_batch_size} rows")
