"""The corpora of a run: where each split's tokens lie, and what decides them."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.artifacts.files import file_digest, read_json, write_json
from nemo_minitron.artifacts.records import CORPORA
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.commands.corpus import left_out
from nemo_minitron.job.run import Run
from nemo_minitron.settings.recipe import Data


def sources(data: Data) -> dict[str, str]:
    """Split -> source, calibration and the held-out text's split filled in."""
    from nemo_minitron.data import held_out

    return {"train": data.train, "test": held_out(data.test), "calibration": data.calibration or data.train}


def tokenise(run: Run, tokenizer: Path, vocab_size: int | None = None) -> None:
    """Tokens of every split: each source is tokenised once, indexed files are used where they lie.

    `vocab_size`: of the teacher; tokens beyond it are refused, with InputError.
    The record keeps split -> prefix, relative to the run folder for what lies in it.
    """
    from nemo_minitron.data import Tokens, build, load_tokenizer

    loaded = load_tokenizer(tokenizer)
    made: dict[str, Tokens] = {}
    record = {}
    for split, source in sources(run.job.data).items():
        if source not in made:
            made[source] = build(
                source, loaded, run.folder.data / split, vocab_size=vocab_size,
                skip_bad_lines=run.job.data.skip_bad_lines,
            )  # fmt: skip
            if words := left_out(made[source], source):
                run.say(f"    {words}")
        tokens = made[source]
        record[split] = _written(tokens.prefix, run.folder.path)
        run.say(f"    {split}: {len(tokens):,} documents, {tokens.tokens:,} tokens")
    write_json(run.folder.corpora, record)


def _written(prefix: Path, folder: Path) -> str:
    prefix, folder = prefix.resolve(), folder.resolve()
    return str(prefix.relative_to(folder)) if folder in prefix.parents else str(prefix)


def prefix(run: Run, split: str) -> Path:
    """Where the tokens of a split lie."""
    record = read_json(run.folder.corpora, "the record of the corpora", CORPORA)
    return run.path(record[split])  # an absolute path stays


def outputs(data: Data) -> tuple[str, ...]:
    """Files of the run folder without which the corpora are not there."""
    from nemo_minitron.data import prefix_of

    given = sources(data)
    first = {source: split for split, source in reversed(given.items())}
    made = [split for source, split in first.items() if prefix_of(source) is None]
    tokens = (f"{RunFolder.data}/{split}{end}" for split in sorted(made) for end in (".bin", ".idx"))
    return (RunFolder.corpora, *tokens)


def sidecars(run: Run) -> list[str]:
    """What says of the tokens in the run folder what they were made of."""
    return [f"{RunFolder.data}/{split}.json" for split in sources(run.job.data)]


def identity(source: str) -> object:
    """What a source holds: a file's digest, sizes and times of indexed files or a folder's; a name as it is."""
    from nemo_minitron.data import prefix_of
    from nemo_minitron.data.text import parted

    name, split = parted(source)
    path, indexed = Path(name), prefix_of(name)
    if indexed is not None:
        return [str(indexed.resolve()), *map(_state, (indexed.with_name(indexed.name + e) for e in (".bin", ".idx")))]
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [split, *([str(file.relative_to(path)), *_state(file)] for file in files)]
    return source


def _state(file: Path) -> list[int]:
    state = file.stat()
    return [state.st_size, state.st_mtime_ns]
