"""The corpora of a run: where the tokens of each split are, and what decides them."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.artifacts.files import file_digest, read_json, write_json
from nemo_minitron.artifacts.records import CORPORA
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.commands.corpus import left_out
from nemo_minitron.job.run import Run
from nemo_minitron.settings.recipe import Data


def sources(data: Data) -> dict[str, str]:
    """Split -> source. The calibration text and the held-out split are filled in if the data leaves them out."""
    from nemo_minitron.data import held_out

    return {"train": data.train, "test": held_out(data.test), "calibration": data.calibration or data.train}


def tokenise(run: Run, tokenizer: Path, vocab_size: int | None = None) -> None:
    """Tokenises every split. Each source is tokenised once; indexed files are used in place.

    The record keeps split -> prefix; a prefix inside the run folder is relative to it. Raises InputError for a token
    that is not below `vocab_size`, the teacher's.
    """
    from nemo_minitron.data import Tokens, build, load_tokenizer

    loaded = load_tokenizer(tokenizer)
    by_source: dict[str, Tokens] = {}
    record = {}
    for split, source in sources(run.job.data).items():
        if source not in by_source:
            by_source[source] = build(
                source, loaded, run.folder.data / split, vocab_size=vocab_size,
                skip_bad_lines=run.job.data.skip_bad_lines,
            )  # fmt: skip
            if remark := left_out(by_source[source], source):
                run.say(f"    {remark}")
        tokens = by_source[source]
        record[split] = _written(tokens.prefix, run.folder.path)
        run.say(f"    {split}: {len(tokens):,} documents, {tokens.tokens:,} tokens")
    write_json(run.folder.corpora, record)


def _written(prefix: Path, folder: Path) -> str:
    prefix, folder = prefix.resolve(), folder.resolve()
    return str(prefix.relative_to(folder)) if folder in prefix.parents else str(prefix)


def prefix(run: Run, split: str) -> Path:
    """The .bin/.idx prefix of a split. Raises InputError for a damaged record."""
    record = read_json(run.folder.corpora, "the record of the corpora", CORPORA)
    return run.path(record[split])  # an absolute prefix stays as it is


def outputs(data: Data) -> tuple[str, ...]:
    """Files of the run folder that the corpora need."""
    from nemo_minitron.data import prefix_of

    first = {source: split for split, source in reversed(sources(data).items())}  # a source is tokenised for one split
    tokenised = [split for source, split in first.items() if prefix_of(source) is None]
    tokens = (f"{RunFolder.data}/{split}{end}" for split in sorted(tokenised) for end in (".bin", ".idx"))
    return (RunFolder.corpora, *tokens)


def sidecars(run: Run) -> list[str]:
    """The files that say what the tokens in the run folder were made from."""
    return [f"{RunFolder.data}/{split}.json" for split in sources(run.job.data)]


def identity(source: str) -> object:
    """Plain values for the content of a source: a file's digest, sizes and times of indexed files or of those in a
    folder, or the name of a `datasets` source."""
    from nemo_minitron.data import prefix_of
    from nemo_minitron.data.files import matching
    from nemo_minitron.data.text import source_of

    name, split, field = source_of(source)
    path, indexed = Path(name), prefix_of(name)
    if indexed is not None:
        return [str(indexed.resolve()), *map(_state, (indexed.with_name(indexed.name + e) for e in (".bin", ".idx")))]
    more: list[str | None] = [split, field] if field else [split] if split else []
    if files := matching(name):
        return [*more, *map(file_digest, files)]
    if path.is_file():
        return [*more, file_digest(path)] if more else file_digest(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [split, *([field] if field else []), *([str(file.relative_to(path)), *_state(file)] for file in files)]
    return source


def _state(file: Path) -> list[int]:
    state = file.stat()
    return [state.st_size, state.st_mtime_ns]
