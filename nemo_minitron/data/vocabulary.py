"""What is asked of a tokenizer: loading, its identity, and the bytes that each of its tokens stands for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.errors import InputError
from nemo_minitron.families.tokenizer import largest_id, open_tokenizer

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SPACE = "\u2581"  # sentencepiece writes a space as ▁


def load_tokenizer(source: Any) -> Any:
    """A fast transformers tokenizer from a folder, a hub id, NeMo's AutoTokenizer, or itself; its code is never run.

    Raises InputError where there is none, or only one in Python, whose tokens cannot be counted in bytes.
    """
    if isinstance(source, (str, Path)):
        source = open_tokenizer(source)
    if not hasattr(source, "backend_tokenizer") and hasattr(source, "tokenizer"):
        source = source.tokenizer  # NeMo's wrapper
    if not hasattr(source, "backend_tokenizer"):
        raise InputError(
            f"a {type(source).__name__} was given: a fast Hugging Face tokenizer (tokenizer.json) is needed"
        )
    return source


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over what decides how text becomes tokens, and over the token that ends a document.

    Not over what adds a BOS, decodes or names roles: NeMo's wrapper changes those, and the tokens stay.
    """
    tokenizer = load_tokenizer(tokenizer)
    parts = parts_of(tokenizer)
    added = [{k: v for k, v in token.items() if k != "special"} for token in parts["added_tokens"]]
    deciding = [parts["normalizer"], parts["pre_tokenizer"], parts["model"], added, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def token_bytes(tokenizer: Any, vocab_size: int | None = None) -> np.ndarray:
    """How many UTF-8 bytes of text each token stands for: int64 [vocab_size], 0 for special tokens.

    Summed over the tokens of a text it is `len(text.encode())`, exactly, so bits per byte need no text.
    Two things lie with the tokenizer: one that normalises (NFC, lower case) is counted on what it makes of
    the text, and one that puts a space in front of a text (Llama 2) has one byte more a document.
    `vocab_size`: the model's, where it has more rows than the tokenizer has ids; rows without a token stay 0.
    Raises InputError for vocabularies whose tokens drop text (WordPiece), and for a smaller `vocab_size`.
    """
    tokenizer = load_tokenizer(tokenizer)
    needed = largest_id(tokenizer) + 1
    size = needed if vocab_size is None else vocab_size
    if size < needed:
        raise InputError(f"vocab_size is {size}: give at least the tokenizer's {needed}")
    count = _counter(parts_of(tokenizer))
    lengths = np.zeros(size, dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = count(token)
    for index, added in tokenizer.added_tokens_decoder.items():  # written as they are, in no alphabet
        lengths[index] = 0 if added.special else len(added.content.encode())
    lengths[tokenizer.all_special_ids] = 0
    return lengths


def _counter(parts: dict[str, Any]) -> Callable[[str], int]:
    """The function from a token's spelling to its bytes, by the alphabet that the vocabulary is spelt in."""
    stages = json.dumps([parts["pre_tokenizer"], parts["decoder"]], ensure_ascii=False)
    if '"ByteLevel"' in stages:
        return len  # one character a byte
    if parts["model"].get("byte_fallback") or '"Metaspace"' in stages or SPACE in stages:
        return _sentencepiece_bytes
    raise InputError(
        f"a {parts['model']['type']} vocabulary whose tokens do not spell out the text was given: "
        "byte-level and sentencepiece vocabularies are legal"
    )


def _sentencepiece_bytes(token: str) -> int:
    return 1 if BYTE_TOKEN.fullmatch(token) else len(token.replace(SPACE, " ").encode())


def parts_of(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer."""
    return json.loads(tokenizer.backend_tokenizer.to_str())
