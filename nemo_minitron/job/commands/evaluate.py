"""A model -> numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.job.commands.corpus import tokenise
from nemo_minitron.job.models import as_folder
from nemo_minitron.job.recipe import Evaluation


def run_evaluate(
    model: str, data: str | None, settings: Evaluation, tasks: Sequence[str] = (), limit: int | None = None
) -> dict[str, Any]:
    """`minitron evaluate`: numbers on held-out text, and lm-eval's under `tasks`; either may be left out.

    A NeMo checkpoint becomes a Hugging Face folder for as long as it takes. Raises InputError.
    """
    from nemo_minitron.evaluation import check_tasks, run_tasks
    from nemo_minitron.nemo.data import held_out

    if data is None and not tasks:
        raise InputError("there is nothing to measure; give --data, --tasks or both")
    check_tasks(tasks)
    numbers: dict[str, Any] = {}
    with as_folder(model) as folder, tempfile.TemporaryDirectory(prefix="minitron-") as scratch:
        if data is not None:
            tokens = tokenise(held_out(data), folder, Path(scratch) / "corpus")
            numbers = measure(folder, tokens, settings) | {"corpus": held_out(data)}
        if tasks:
            numbers["tasks"] = run_tasks(
                folder, tasks, precision=settings.precision, batch_size=settings.batch_size, limit=limit
            )
    return numbers


def measure(folder: Path, tokens: Any, settings: Evaluation) -> dict[str, Any]:
    """Numbers of a Hugging Face folder on the first windows of a corpus of its tokenizer's tokens."""
    from nemo_minitron.evaluation import evaluate
    from nemo_minitron.nemo.data import load_tokenizer, token_bytes

    from_hf(folder)
    count = max(1, min(settings.tokens // settings.sequence_length, tokens.samples(settings.sequence_length)))
    windows = tokens.windows(settings.sequence_length, count)
    lengths = token_bytes(load_tokenizer(folder))
    return evaluate(
        folder, windows, token_bytes=lengths, precision=settings.precision, batch_size=settings.batch_size
    ).as_dict()
