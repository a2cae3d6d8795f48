"""A distilled student -> a student that is tuned on prompts and answers."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np

from nemo_minitron.artifacts.files import atomic_file, digest_of, file_digest, parse_json, write_json
from nemo_minitron.artifacts.run_folder import TrainingFolder
from nemo_minitron.artifacts.seals import sealed
from nemo_minitron.commands.corpus import begin, positions_of, say
from nemo_minitron.commands.distill import (
    check_out,
    export_student,
    finished,
    left_by_training,
    made_with,
    trained_before,
)
from nemo_minitron.commands.place import working
from nemo_minitron.commands.same_host import begin_on_this_host
from nemo_minitron.errors import InputError
from nemo_minitron.families import resolve
from nemo_minitron.hosts import check_model, host_of
from nemo_minitron.launch.torchrun import launch
from nemo_minitron.settings.derive import Fit
from nemo_minitron.settings.finetuning import Finetuning
from nemo_minitron.settings.fp8 import check_fp8
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.orders import FinetuneOrder

PACKED = (".gz", ".zst", ".csv", ".tsv", ".parquet")  # what other commands read and a host's loader does not
FIELDS = ("input", "output")


def run_finetune(student: str, data: Path, out: Path, recipe: Finetuning, layout: Layout) -> Finetuning:
    """`minitron finetune`: a Hugging Face folder -> a tuned one, `out`, with `loss.csv` beside its files. The same call
    resumes. `data`: a JSONL file of objects with the texts `input` and `output`. Returns the settings, some of which
    may be derived. Raises InputError for what cannot run, and RuntimeError if a process fails."""
    from nemo_minitron.pruning import HFSource

    source = resolve(student)
    check_out(out, (source,))
    opened = HFSource(source)
    check_model(opened.config, "finetune")
    fit = Fit(recipe, layout)
    fit.model(positions_of(opened.config))
    say(fit.remark)
    recipe, architecture = fit.settings, opened.architecture
    layout = layout.for_depth(architecture.num_layers)
    layout.check(architecture, training=True)
    layout.check_sequence(recipe.sequence_length)
    recipe.training().check_tokens(layout)
    recipe.training().check_batch(layout)
    check_fp8(architecture, layout, recipe.precision)
    check_rows(data)
    _check_tokens(data, source, recipe, architecture.vocab_size)
    begin(f"tuning {student} on {data}")
    made_of = digest_of([dataclasses.asdict(recipe), opened.identity, file_digest(data)])
    if trained_before(out, made_of):
        return recipe
    with working(out) as work:
        training = work / "training"
        _begin(training, made_of, data)
        if not finished(training, recipe.steps):
            _clear_index(training / "data")
            TrainingFolder(training).whole.unlink(missing_ok=True)
            order = FinetuneOrder(source, training / "data", training, recipe, layout)
            launch(order, host_of().worker, work / "log.txt")
            write_json(TrainingFolder(training).whole, sealed(training, left_by_training(training)))
        finished(training, recipe.steps)
        export_student(training, opened, out, made_of)
    return recipe


def _begin(training: Path, identity: str, data: Path) -> None:
    """Prepares a training's folder; a training of other settings there starts over. The rows are copied into it, since
    NeMo writes its index beside them."""
    mark = TrainingFolder(training).settings
    if training.exists() and not made_with(mark, identity):
        shutil.rmtree(training)
    begin_on_this_host(training)
    rows = training / "data" / "training.jsonl"
    if not rows.is_file() or file_digest(rows) != file_digest(data):
        with atomic_file(rows) as copy:
            shutil.copyfile(data, copy)
    write_json(mark, identity)


def _check_tokens(data: Path, folder: Path, recipe: Finetuning, vocab_size: int) -> None:
    """Raises InputError if the rows have a token outside the student's vocabulary, which NeMo would not check."""
    from nemo_minitron.data import load_tokenizer
    from nemo_minitron.data.lines import json_lines
    from nemo_minitron.families.tokenizer import check_ids, largest_id

    tokenizer = load_tokenizer(folder)
    if largest_id(tokenizer) < vocab_size:
        return
    for _, line in json_lines(io.BytesIO(data.read_bytes()), str(data)):
        row = parse_json(line)
        text = recipe.prompt_template.replace("{input}", row["input"]).replace("{output}", row["output"])
        check_ids(np.array(tokenizer(text)["input_ids"], np.int64), tokenizer, vocab_size, str(data))


def _clear_index(folder: Path) -> None:
    """Removes NeMo's index of the rows: NeMo would unpickle it, and makes a new one at once."""
    for file in folder.iterdir():
        if file.name != "training.jsonl":
            file.unlink()


def check_rows(data: Path) -> int:
    """The number of rows. Raises InputError, with the number of the line, for a row without a prompt or an answer."""
    if data.suffix in PACKED:
        raise InputError(f"'{data}' ends with {data.suffix}; the prompts must be plain lines of JSON, a .jsonl file")
    try:
        content = data.read_bytes()
    except OSError as error:
        raise InputError(f"the prompts '{data}' cannot be read ({error})") from None
    from nemo_minitron.data.lines import json_lines, read_line, utf8

    rows = 0
    for where, line in json_lines(io.BytesIO(content), str(data)):
        row = read_line(line, where)
        if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in FIELDS):
            raise InputError(f"{where} lacks a text 'input' or 'output'; each row has both")
        for field in FIELDS:
            utf8(row[field], where)
        rows += 1
    if not rows:
        raise InputError(f"'{data}' holds no prompt; it needs lines with input and output")
    return rows
