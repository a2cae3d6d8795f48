"""The stage in which the teacher writes the text that its student is trained on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts import parse
from nemo_minitron.artifacts.files import atomic_file, digest_of, file_digest, parse_json, write_json
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.families import from_hf
from nemo_minitron.job.lineage import learned_from
from nemo_minitron.job.run import Run, Stage
from nemo_minitron.job.stages import corpora
from nemo_minitron.job.teacher import teacher_folder
from nemo_minitron.pruning.convert import as_folder
from nemo_minitron.settings.generation import Generation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nemo_minitron.data import Tokens

WRITTEN = parse.grouped({"prompt": parse.text(), "continuation": parse.text()})


def inputs(run: Run) -> list[object]:
    """[settings, identity of the model that writes]: plain values that decide the text."""
    settings = run.job.generation
    prompts = file_digest(settings.prompts) if settings.prompts else ""
    values = dataclasses.asdict(settings) | {"prompts": prompts, "precision": run.job.evaluation.precision}
    return [values, run.open(learned_from(run.job)).identity]


def generate(run: Run) -> None:
    """The stage. Batches that were written before a kill are kept. Raises InputError as `prompts_of`, and if the
    teacher wrote nothing at all."""
    from nemo_minitron.data import Tokens, build, load_tokenizer

    tokenizer = load_tokenizer(teacher_folder(run))
    prompts = prompts_of(run.job.generation, Tokens(corpora.prefix(run, "train")), tokenizer)
    identity = digest_of([inputs(run), prompts])
    parts = run.path(f"{RunFolder.generation}.{identity[:16]}")
    with as_folder(run.job.learns_from or teacher_folder(run)) as folder:
        write_parts(run, folder, prompts, parts)
    rows = [row for part in sorted(parts.glob("*.jsonl")) for row in _rows(part)]
    text = run.path(f"{RunFolder.generated}.jsonl")
    written = gather(rows, text)
    tokens = build(text, tokenizer, run.folder.generated, vocab_size=from_hf(teacher_folder(run)).vocab_size)
    settings, model = inputs(run)
    origin = {"settings": settings, "model": model, "prompts": digest_of(prompts), "text": file_digest(text)}
    write_json(run.path(f"{RunFolder.generation}.json"), {**origin, **written, "tokens": tokens.tokens})
    for batches in filter(Path.is_dir, run.folder.data.glob(f"{run.folder.generation.name}.*")):  # of any settings
        shutil.rmtree(batches)
    run.say(f"    {len(tokens):,} documents, {tokens.tokens:,} tokens; {written['empty']} empty ones left out")


def _rows(part: Path) -> list[JsonObject]:
    """The documents of one batch. Raises InputError for a damaged file."""
    from nemo_minitron.data.lines import json_lines

    try:
        with part.open("rb") as file:
            lines = [line for _, line in json_lines(file, str(part))]
        return [parse.checked(parse_json(line), WRITTEN, f"the batch '{part}'") for line in lines]
    except ValueError as error:
        raise InputError(f"'{part}' is damaged ({first_line(error)}); delete it and run the same again") from None


def prompts_of(settings: Generation, corpus: Tokens, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each document's prompt. Raises InputError for a file or a corpus with too few prompts."""
    from nemo_minitron.data import documents

    if settings.prompts:
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in documents(settings.prompts)]
        return [ids[i % len(ids)] for i in range(settings.documents)]
    import numpy as np

    length, prompts = settings.prompt_tokens, []
    for window in np.random.default_rng(settings.seed).permutation(corpus.samples(length)):
        row = corpus.stream(int(window) * length, length)
        if tokenizer.eos_token_id not in row:
            prompts.append(row.tolist())
        if len(prompts) == settings.documents:
            return prompts
    if not prompts:
        raise InputError(f"no document of the corpus has {length} tokens for a prompt; set a smaller prompt_tokens")
    raise InputError(
        f"the corpus has {len(prompts)} prompts of {length} tokens within a document, but generation.documents is "
        f"{settings.documents}; the nearest legal number is {len(prompts)}"
    )


def write_parts(run: Run, folder: Path, prompts: list[list[int]], parts: Path) -> None:
    """Writes a file for each batch into the folder `parts`. Each file is whole or missing; existing ones are kept."""
    from nemo_minitron.evaluation import sample

    settings = run.job.generation
    parts.mkdir(parents=True, exist_ok=True)
    batches = sample(
        folder, prompts, max_new_tokens=settings.new_tokens, temperature=settings.temperature, top_p=settings.top_p,
        seed=settings.seed, batch_size=settings.batch_size, precision=run.job.evaluation.precision,
        skip=lambda first: (parts / f"{first:08d}.jsonl").is_file(),
    )  # fmt: skip
    done = sum(len(read.read_text().splitlines()) for read in parts.glob("*.jsonl"))
    with run.progress("generate: document", "tokens", settings.new_tokens) as progress:
        progress.begin(done)
        for first, written in batches:
            lines = [json.dumps(dataclasses.asdict(text)) + "\n" for text in written]
            with atomic_file(parts / f"{first:08d}.jsonl") as partial:
                partial.write_text("".join(lines))
            done += len(lines)
            progress(done, len(prompts))
    run.say(f"    {done:,} of {len(prompts):,} documents")


def gather(rows: list[dict[str, str]], out: Path) -> dict[str, int]:
    """Writes the documents that have a continuation into one JSONL file. Gives the numbers of documents and of empty
    ones. Raises InputError if every one is empty."""
    kept = [{"text": row["prompt"] + row["continuation"]} for row in rows if row["continuation"].strip()]
    if not kept:
        raise InputError(
            f"the teacher wrote nothing after any of {len(rows)} prompts: it ended each at once; give other prompts"
        )
    with atomic_file(out) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return {"documents": len(kept), "empty": len(rows) - len(kept)}


def trained_on(run: Run) -> Path:
    """The .bin/.idx prefix of the text that the student is trained on."""
    return run.folder.generated if run.job.generation.wanted else corpora.prefix(run, "train")


OUTPUTS = (f"{RunFolder.generation}.json", *(f"{RunFolder.generated}{end}" for end in (".jsonl", ".bin", ".idx")))
WRITE = Stage("generate", generate, inputs, ("data",), OUTPUTS, lambda run: [f"{RunFolder.generated}.json"])
