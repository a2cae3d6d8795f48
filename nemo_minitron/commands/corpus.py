"""Text -> tokens, for commands and stages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts.json_types import JsonFields

if TYPE_CHECKING:
    from nemo_minitron.data import Tokens


def tokenise(data: str, model: str | Path, prefix: Path, vocab_size: int, skip_bad_lines: bool = False) -> Tokens:
    """Text -> `.bin/.idx`, with the tokenizer in the folder `model`; existing files of the same text are reused. Gives
    the Tokens, all below `vocab_size`. Prints on stderr how many bad lines were left out. Raises InputError as
    `data.build`."""
    from nemo_minitron.data import build, load_tokenizer

    tokens = build(data, load_tokenizer(model), prefix, vocab_size=vocab_size, skip_bad_lines=skip_bad_lines)
    if remark := left_out(tokens, data):
        print(f"minitron: {remark}", file=sys.stderr)
    return tokens


def left_out(tokens: Tokens, data: str) -> str:
    """A sentence on the bad lines that were skipped; "" if there were none."""
    if tokens.corpus is None or not tokens.corpus.skipped:
        return ""
    return f"{tokens.corpus.skipped:,} bad lines of '{data}' are left out; the first: {tokens.corpus.first_skipped}"


def say(remark: str) -> None:
    """Prints which sizes were derived, on stderr: the result on stdout may be JSON."""
    if remark:
        print(f"remark: {remark}", file=sys.stderr, flush=True)


def positions_of(*configs: JsonFields) -> int | None:
    """The longest sequence, in tokens, that all of these models allow. None if no config says."""
    return min((int(c["max_position_embeddings"]) for c in configs if c.get("max_position_embeddings")), default=None)


def begin(doing: str) -> None:
    """Prints what a command begins to do, on stderr: the first line, before anything that takes long."""
    print(f"{doing} ...", file=sys.stderr, flush=True)


def corpus_identity(prefix: Path) -> str:
    """Identity of a corpus of tokens: the digest of its content, or size and time if this package did not make it."""
    from nemo_minitron.data import Tokens

    corpus = Tokens(prefix).corpus
    state = prefix.with_name(prefix.name + ".bin").stat()
    return corpus.content if corpus else f"{state.st_size} {state.st_mtime_ns}"
