"""`minitron evaluate`: a model -> numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_minitron.cli.options import HeldOut, Length, Precision, SkipBadLines


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Hugging Face folder, hub id, or NeMo checkpoint (converted for the time it takes).")
    ],
    data: HeldOut = None,
    skip_bad_lines: SkipBadLines = False,
    tasks: Annotated[str, typer.Option("--tasks", help="lm-eval tasks: NAME, FILE.yaml, base, instruct.")] = "",
    limit: Annotated[Optional[int], typer.Option("--limit", help="Documents of each task.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="At most so many tokens.")] = 16_384,
    sequence_length: Length = 512,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 4,
    precision: Precision = "bf16",
    draft_of: Annotated[
        Optional[str], typer.Option("--draft-of", help="Its teacher: MODEL as its draft, the tokens that are accepted.")
    ] = None,
    draft_out: Annotated[
        Optional[Path], typer.Option("--draft-out", help="Folder for the pair's vLLM and TensorRT-LLM configuration.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Loss, perplexity and bits per byte; lm-eval tasks; what a larger model accepts of its tokens."""
    import json

    from nemo_minitron.commands.evaluate import run_evaluate
    from nemo_minitron.job import Evaluation
    from nemo_minitron.precisions import WIDE
    from nemo_minitron.settings.precision import resolve_precision

    settings = Evaluation(tokens, sequence_length, batch_size, resolve_precision(precision, WIDE))
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    numbers = run_evaluate(model, data, settings, names, limit, draft_of, draft_out, skip_bad_lines)
    if as_json:
        print(json.dumps(numbers))
        return
    results, draft = numbers.pop("tasks", {}), numbers.pop("draft", {})
    commands = draft.pop("commands", [])
    lines = [f"{name:14}{value}" for name, value in numbers.items()]
    lines += [f"{task}  {metric:24}{value}" for task, row in results.items() for metric, value in row.items()]
    lines += [*(f"draft  {name:12}{value}" for name, value in draft.items()), *commands]
    print("\n".join(lines))
