"""`minitron distill`: a student learns from its teacher's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_minitron.cli.nodes import Count, Meeting, Rank, on_nodes
from nemo_minitron.cli.options import Cp, Data, Dp, Ep, Length, Pp, Precision, Seed, SkipBadLines, Sp, Stall, Tp, Vp
from nemo_minitron.launch.stall import SECONDS


def distill(
    student: Annotated[str, typer.Argument(help="Hugging Face folder of the pruned student.")],
    data: Data,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of all steps together.")],
    out: Annotated[Path, typer.Option("--out", help="The distilled Hugging Face folder.")],
    teacher: Annotated[
        Optional[str], typer.Option("--teacher", help="Hugging Face folder, hub id or NeMo checkpoint.")
    ] = None,
    teacher_cache: Annotated[
        str, typer.Option("--teacher-cache", help="Folder of minitron cache-logits, in the teacher's place.")
    ] = "",
    sequence_length: Length = 512,
    global_batch_size: Annotated[int, typer.Option("--global-batch-size")] = 1,
    micro_batch_size: Annotated[int, typer.Option("--micro-batch-size")] = 1,
    learning_rate: Annotated[float, typer.Option("--learning-rate")] = 3e-4,
    loss: Annotated[str, typer.Option("--loss", help="On logits: forward_kl, mse, ...")] = "forward_kl",
    temperature: Annotated[float, typer.Option("--temperature", help="Of the loss; a cache's must agree.")] = 1.0,
    logits_weight: Annotated[float, typer.Option("--logits-weight", help="0: the LM loss alone.")] = 1.0,
    lm_weight: Annotated[float, typer.Option("--lm-weight", help="Of the language-model loss.")] = 0.0,
    moe_aux_loss: Annotated[float, typer.Option("--moe-aux-loss-coeff", help="Of routers' load balancing.")] = 0.0,
    intermediate: Annotated[str, typer.Option("--intermediate", help="auto, or pairs such as block:13:29.")] = "",
    plan: Annotated[Optional[Path], typer.Option("--plan", help="The plan that the student comes from.")] = None,
    start: Annotated[str, typer.Option("--start", help="pruned, or random: the baseline.")] = "pruned",
    correction_tokens: Annotated[int, typer.Option("--correction-tokens", help="First learned by the teacher.")] = 0,
    validation: Annotated[Optional[str], typer.Option("--validation", help="Held-out text.")] = None,
    validate_every: Annotated[int, typer.Option("--validate-every", help="Steps between two validations.")] = 0,
    patience: Annotated[int, typer.Option("--patience", help="Validations without a lower loss; then it ends.")] = 0,
    precision: Precision = "bf16",
    save_every: Annotated[int, typer.Option("--save-every", help="Steps between checkpoints.")] = 100,
    tp: Tp = 1,
    pp: Pp = 1,
    vp: Vp = 1,
    cp: Cp = 1,
    ep: Ep = 1,
    dp: Dp = 1,
    sp: Sp = False,
    skip_bad_lines: SkipBadLines = False,
    seed: Seed = 1234,
    nodes: Count = None,
    node_rank: Rank = None,
    rendezvous: Meeting = None,
    stall_timeout: Stall = SECONDS,
) -> None:
    """Retrain a student from the teacher's logits; run again after a kill, it goes on."""
    from nemo_minitron.commands.distill import run_distill
    from nemo_minitron.job import Distillation, Layout
    from nemo_minitron.settings.precision import resolve_precision

    settings = Distillation(
        tokens=tokens, sequence_length=sequence_length, global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size, learning_rate=learning_rate, min_learning_rate=learning_rate / 10,
        warmup_steps=10, loss=loss, temperature=temperature, teacher_cache=teacher_cache, logits_weight=logits_weight,
        lm_weight=lm_weight, moe_aux_loss_coeff=moe_aux_loss, intermediate=intermediate, start=start,
        correction_tokens=correction_tokens, validate_every=validate_every, patience=patience,
        precision=resolve_precision(precision), save_every=save_every, seed=seed,
    )  # fmt: skip
    layout = Layout(tp=tp, pp=pp, vp=vp, cp=cp, ep=ep, dp=dp, sp=sp)

    def command() -> None:
        run_distill(
            student, teacher, data, out, settings, layout, validation=validation, plan=plan,
            skip_bad_lines=skip_bad_lines,
        )  # fmt: skip
        print(f"{out}: distilled on {settings.steps * sequence_length * global_batch_size:,} tokens")

    job = ["distill", student, teacher, data, vars(settings), vars(layout), validation, str(plan)]
    on_nodes((nodes, node_rank, rendezvous), layout, job, out, command)
