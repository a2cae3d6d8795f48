"""Text -> tokens, where a command or a stage wants them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_minitron.data import Tokens


def tokenise(data: str, model: str | Path, prefix: Path, vocab_size: int, skip_bad_lines: bool = False) -> Tokens:
    """Text -> `.bin/.idx` with the tokenizer in the folder `model`, once; gives the Tokens, all of them below
    `vocab_size`. Says on stderr how many bad lines were left out. Raises InputError as `data.build`."""
    from nemo_minitron.data import build, load_tokenizer

    tokens = build(data, load_tokenizer(model), prefix, vocab_size=vocab_size, skip_bad_lines=skip_bad_lines)
    if words := left_out(tokens, data):
        print(f"minitron: {words}", file=sys.stderr)
    return tokens


def left_out(tokens: Tokens, data: str) -> str:
    """What is said of bad lines that were skipped; "" where there were none."""
    if tokens.corpus is None or not tokens.corpus.skipped:
        return ""
    return f"{tokens.corpus.skipped:,} bad lines of '{data}' are left out; the first: {tokens.corpus.first_skipped}"


def say(remark: str) -> None:
    """What was derived where nobody asked for a size: on stderr, beside a result that may be JSON."""
    if remark:
        print(f"remark: {remark}", file=sys.stderr, flush=True)


def positions_of(*configs: Mapping[str, Any]) -> int | None:
    """The longest sequence that all of these models were made for, of those whose configs say so."""
    return min((int(c["max_position_embeddings"]) for c in configs if c.get("max_position_embeddings")), default=None)


def cache_of(out: Path) -> Path:
    """Where a command keeps its tokens and sample index: beside its result, named so that it is not read as one."""
    return out.parent / f".{out.name}.work"


def corpus_identity(prefix: Path) -> str:
    """What a corpus of tokens holds: its content's digest, or size and time where it came ready-made."""
    from nemo_minitron.data import Tokens

    corpus = Tokens(prefix).corpus
    state = prefix.with_name(prefix.name + ".bin").stat()
    return corpus.content if corpus else f"{state.st_size} {state.st_mtime_ns}"
