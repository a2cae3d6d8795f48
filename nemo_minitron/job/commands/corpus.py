"""Text -> tokens, where a command or a stage wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tokenise(data: str, model: str | Path, prefix: Path) -> Any:
    """Text -> `.bin/.idx` with the model's tokenizer, once; gives the Tokens."""
    from nemo_minitron.nemo.data import build, load_tokenizer

    return build(data, load_tokenizer(model), prefix)


def cache_of(out: Path) -> Path:
    """Where a command keeps its tokens and sample index: beside its result, named so that it is not read as one."""
    return out.parent / f".{out.name}.work"


def corpus_identity(prefix: Path) -> str:
    """What a corpus of tokens holds: its content's digest, or size and time where it came ready-made."""
    from nemo_minitron.nemo.data import Tokens

    corpus = Tokens(prefix).corpus
    state = prefix.with_name(prefix.name + ".bin").stat()
    return corpus.content if corpus else f"{state.st_size} {state.st_mtime_ns}"
