"""Loads a tokenizer, computes its identity, and counts the bytes that each of its tokens stands for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.families.tokenizer import largest_id, open_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from nemo_minitron.data.files import Render

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SPACE = "\u2581"  # sentencepiece writes a space as ▁


class NeMoTokenizer(Protocol):
    """NeMo's AutoTokenizer, as far as it is used here."""

    tokenizer: PreTrainedTokenizerBase


def load_tokenizer(source: str | Path | PreTrainedTokenizerBase | NeMoTokenizer) -> PreTrainedTokenizerFast:
    """A fast transformers tokenizer from a folder, a hub id, NeMo's AutoTokenizer or a tokenizer; its code is never
    run.

    Raises InputError if there is none, or only one written in Python, whose tokens cannot be counted in bytes.
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


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, in hex, of all parts that decide how text becomes tokens, and of the token that ends a document.

    It does not cover the parts that add a BOS, decode, or name roles: NeMo's wrapper changes those without changing the
    tokens.
    """
    tokenizer = load_tokenizer(tokenizer)
    parts = parts_of(tokenizer)
    added = [{k: v for k, v in token.items() if k != "special"} for token in parts["added_tokens"]]
    deciding = [parts["normalizer"], parts["pre_tokenizer"], parts["model"], added, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> np.ndarray:
    """The number of UTF-8 bytes of text that each token stands for: int64 [vocab_size], 0 for special tokens.

    The sum over the tokens of a text is exactly `len(text.encode())`, so bits per byte need no text. There are two
    exceptions: a tokenizer that normalises (NFC, lower case) is counted on the normalised text, and one that puts a
    space in front of a text (Llama 2) has one byte more a document.
    `vocab_size`: the model's, if it has more rows than the tokenizer has ids; rows without a token stay 0.
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
    for index, added in tokenizer.added_tokens_decoder.items():  # added tokens are stored as plain text
        lengths[index] = 0 if added.special else len(added.content.encode())
    lengths[tokenizer.all_special_ids] = 0
    return lengths


def _counter(parts: JsonObject) -> Callable[[str], int]:
    """The function from a token's spelling to its number of bytes; it depends on the vocabulary's alphabet."""
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


def parts_of(tokenizer: PreTrainedTokenizerBase) -> JsonObject:
    """The tokenizer.json of a tokenizer."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def chat_template(tokenizer: PreTrainedTokenizerBase) -> Render:
    """A function that writes chat messages as the tokenizer's template does. It raises InputError without a template,
    and for messages that the template refuses."""

    def render(messages: list[Any]) -> str:
        if not tokenizer.chat_template:
            raise InputError("the model's tokenizer has no chat template, so chat messages cannot be written as text")
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template is a program: it may raise anything
            raise InputError(f"the chat template refuses the messages: {first_line(error)}") from None

    return render
