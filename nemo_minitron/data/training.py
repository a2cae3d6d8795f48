"""The corpora of a training: they are opened and checked before a host loads anything slow."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from nemo_minitron.data.indexed import Tokens, check_tokenizer
from nemo_minitron.data.vocabulary import load_tokenizer
from nemo_minitron.errors import InputError


def training_corpora(
    train: str | Path, validation: str | Path, tokenizer: Any, sequence_length: int, global_batch_size: int
) -> tuple[Tokens, Tokens]:
    """Opens the training's and the validation's corpus.

    Raises InputError if a file is missing, if the tokens come from another tokenizer, or if a corpus is too short for
    one sample or (validation) for one global batch.
    """
    sources = Tokens(train), Tokens(validation)
    for name, source, samples in zip(("training", "validation"), sources, (1, global_batch_size), strict=True):
        _check_length(name, source, sequence_length, samples)
        check_tokenizer(source.prefix, load_tokenizer(tokenizer))
    return sources


def index_name(*sources: Tokens) -> str:
    """A name for the index folder, made from the corpora's digests. A corpus without a sidecar file has no digest; its
    size and time take the digest's place."""
    digest = hashlib.sha256()
    for source in sources:
        state = source.prefix.with_name(source.prefix.name + ".bin").stat()
        corpus = source.corpus
        content = (corpus.content, corpus.tokenizer) if corpus else (state.st_size, state.st_mtime_ns)
        digest.update(repr(content).encode())
    return digest.hexdigest()[:16]


def check_batch(micro: int, total: int) -> None:
    """Raises InputError if micro batches of `micro` rows do not fill a global batch of `total` rows."""
    if micro < 1 or total < 1 or total % micro:
        legal = max(micro, total - total % micro) if micro > 0 and total > 0 else 1
        raise InputError(
            f"the global batch is {total} and the micro batch {micro}: the first must be a multiple of the "
            f"second, give a global batch of {legal}"
        )


def _check_length(name: str, source: Tokens, sequence_length: int, samples: int) -> None:
    """Raises InputError if a corpus has fewer samples. Megatron's samples have one token more than the sequence, the
    last label."""
    available = max(0, (source.tokens - 1) // sequence_length)
    longest = max(1, (source.tokens - 1) // samples)
    if available < samples:
        raise InputError(
            f"the {name} corpus gives {available} samples of {sequence_length} tokens, {samples} are needed for "
            f"one batch: give a sequence length of {longest} or less, or more text"
        )
