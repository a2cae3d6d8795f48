"""A model -> its numbers on held-out text, on lm-eval's tasks, and as a draft."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.temporary import apart
from nemo_minitron.commands.corpus import begin, positions_of, say, tokenise
from nemo_minitron.commands.vocabularies import check_one_vocabulary
from nemo_minitron.errors import InputError
from nemo_minitron.families import check_draft, from_hf, resolve
from nemo_minitron.progress import Progress
from nemo_minitron.pruning.convert import as_folder
from nemo_minitron.settings.derive import Fit
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.recipe import Evaluation
from nemo_minitron.settings.validated import check_whole
from nemo_minitron.sources.open import config_of, is_checkpoint, tokenizer_folder_of

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_minitron.data import Tokens
    from nemo_minitron.evaluation import Numbers


def run_evaluate(
    model: str, data: str | None, settings: Evaluation, tasks: Sequence[str] = (), limit: int | None = None,
    draft_of: str | None = None, draft_out: Path | None = None, skip_bad_lines: bool = False,
) -> JsonObject:  # fmt: skip
    """`minitron evaluate`: numbers on held-out text, and those of lm-eval under `tasks`. Either may be left out.

    `limit`: the number of documents of each task; None means all. `draft_of`: a larger model of the same vocabulary;
    the result then says under `draft` which of `model`'s tokens it would accept. `draft_out`: a folder for the
    configuration with which servers load both models, which must then be Hugging Face folders. A checkpoint is
    converted to a temporary Hugging Face folder. Raises InputError.
    """
    from nemo_minitron.data import held_out
    from nemo_minitron.evaluation import check_tasks, run_tasks
    from nemo_minitron.evaluation.model import check_loads
    from nemo_minitron.export import write_draft

    if data is None and not tasks:
        raise InputError("there is nothing to measure; give --data, --tasks or both")
    if limit is not None:
        check_whole("limit", limit)
    _check_draft(model, data, draft_of, draft_out)
    check_tasks(tasks)
    for given in filter(None, (model, draft_of)):
        check_loads(config_of(given), "evaluate")
    if data is not None:
        fit = Fit(settings, Layout())
        fit.model(positions_of(*map(config_of, [model] if draft_of is None else [model, draft_of])))
        say(fit.remark)
        settings = fit.settings
    begin(f"measuring {model}")
    numbers: JsonObject = {}
    with as_folder(model) as folder, apart() as scratch:
        if data is not None:
            tokens = tokenise(held_out(data), folder, scratch / "corpus", from_hf(folder).vocab_size, skip_bad_lines)
            numbers = measure(folder, tokens, settings) | {"corpus": held_out(data)}
            if draft_of is not None:
                numbers["draft"] = accepted(draft_of, folder, tokens, settings)
        if tasks:
            numbers["tasks"] = run_tasks(
                folder, tasks, precision=settings.precision, batch_size=settings.batch_size, limit=limit
            )
    if draft_of is not None and draft_out is not None:
        length = max(1, numbers["draft"]["length"])  # a server drafts at least one token
        numbers["draft"]["commands"] = write_draft(draft_out, resolve(draft_of), resolve(model), length)
    return numbers


def _check_draft(model: str, data: str | None, draft_of: str | None, draft_out: Path | None) -> None:
    """Raises InputError, before anything is measured, if a model cannot be the draft of the other, or `draft_out`
    cannot be written."""
    if draft_out is not None and draft_of is None:
        raise InputError("--draft-out needs the model whose draft this one is; give --draft-of")
    if draft_of is None:
        return
    if data is None:
        raise InputError("--draft-of needs text on which the two models are compared; give --data")
    target, _ = check_draft(config_of(draft_of), config_of(model))
    folders = tokenizer_folder_of(model), tokenizer_folder_of(draft_of)
    say(check_one_vocabulary(*folders, target.vocab_size, f"'{draft_of}'"))
    if draft_out is None:
        return
    if draft_out.exists() and not draft_out.is_dir():
        raise InputError(f"--draft-out '{draft_out}' is a file; give a folder")
    for side in (draft_of, model):
        if is_checkpoint(resolve(side)):
            raise InputError(
                f"'{side}' is a checkpoint of NeMo or Megatron-Bridge, which servers do not read; give Hugging Face "
                "folders"
            )


def measure(folder: Path, tokens: Tokens, settings: Evaluation) -> JsonObject:
    """The numbers of `measured`, as plain values."""
    return measured(folder, tokens, settings).as_dict()


def measured(
    folder: Path, tokens: Tokens, settings: Evaluation, progress: Callable[[str, str, float], Progress] = Progress
) -> Numbers:
    """Numbers of a Hugging Face folder on the first windows of a corpus of its tokens: loss in nats a token,
    perplexity, bits per byte, seconds. `progress(what, unit, scale)` shows how far it is. Raises InputError."""
    from nemo_minitron.data import load_tokenizer, token_bytes
    from nemo_minitron.evaluation import evaluate

    from_hf(folder)
    windows = _windows(tokens, settings)
    lengths = token_bytes(load_tokenizer(folder))
    with progress("evaluate: window", "tokens", settings.sequence_length) as shown:
        return evaluate(
            folder, windows, token_bytes=lengths, precision=settings.precision, batch_size=settings.batch_size,
            progress=shown,
        )  # fmt: skip


def accepted(target: str, draft: Path, tokens: Tokens, settings: Evaluation) -> JsonObject:
    """How many of `draft`'s tokens `target` accepts in speculative decoding, on the same windows as `measure`."""
    from nemo_minitron.evaluation import draft_acceptance

    with as_folder(target) as folder, Progress("compare: window", "tokens", settings.sequence_length) as shown:
        return draft_acceptance(
            folder, draft, _windows(tokens, settings), precision=settings.precision, batch_size=settings.batch_size,
            progress=shown,
        ).as_dict()  # fmt: skip


def _windows(tokens: Tokens, settings: Evaluation) -> Tensor:
    """int64 [windows, sequence_length]: the first windows of a corpus, at most `settings.tokens` tokens, at least one
    window."""
    count = max(1, min(settings.tokens // settings.sequence_length, tokens.samples(settings.sequence_length)))
    return tokens.windows(settings.sequence_length, count)
