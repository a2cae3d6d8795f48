"""Tokenises a long document in pieces, with exactly the tokens that the whole document has.

A text is cut after a letter or digit x and before a mark y (a blank, a full stop, ...), if the tokens are provably the
same. The proof:

- In every tokenizer that `marks_of` knows, the splitter ends a word between x and y: no alternative of its pattern
  continues from a letter or digit to a mark, and some alternative matches every letter and digit. No pattern looks
  back, and the only one that looks ahead, `\\s+(?!\\S)`, never does so from x. Hence the words before the cut are those
  of the text up to x, whatever follows, and the words after it are the same after any text that ends in x. Tokens
  never cross words.
- Without a splitter (Llama 2, Mistral, Phi-3) BPE merges the whole text. No merge crosses x and y if no token of the
  vocabulary has a letter or digit before y.
- NFC and NFKC change nothing across the cut: x is a normal form, and y starts a new one.
- A tokenizer that puts something in front of a text (a blank, `▁`) does so for each piece too. So a piece starts with
  the x before it, and the tokens of x are dropped afterwards; their number is that of x alone.
- Added tokens are matched first. If one ends in x, or has y after x, then x is not a legal place for a cut.

For other tokenizers (Unigram without a splitter, unknown patterns) a document is not cut.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nemo_minitron.artifacts.json_types import JsonFields
from nemo_minitron.data.lines import Document
from nemo_minitron.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 1 << 15  # bytes; a tokenizer's records of the tokens take some hundred times as much memory
WINDOW = 1 << 12  # bytes that are searched for a cut at a time
MARKS = " \n.,;:!?)" + "\u3001\u3002\uff0c\uff1a\uff1b\uff01\uff1f"  # and their full-width forms
BLANK = "\u2581"  # how SentencePiece writes a blank
LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = frozenset({
    r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+", r" ?\p{N}+", r"\p{N}", r"\p{N}{1,3}",
    r"\p{N}{1,3}+", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", ENDING, r"'(?i:[sdmt]|ll|ve|re)",
    r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+",
    *(rf"[^\r\n\p{{L}}\p{{N}}]?{LETTERS[0]}{a}{LETTERS[1]}{b}{end}"
      for a, b in ("*+", "+*") for end in ("", f"{ENDING}?")),
})  # fmt: skip
"""Alternatives of the splitters of GPT-2, Llama 3, Qwen, o200k and similar ones. Each was checked by hand: none
continues from a letter or digit to one of MARKS, and none looks back."""
COVERING = (
    {r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+", *(w for w in WORDS if LETTERS[0] in w)},
    {r" ?\p{N}+", r"\p{N}", r"\p{N}{1,3}", r"\p{N}{1,3}+"},
)
"""A pattern needs one alternative of each set, so that every letter and every digit lies in a match."""


class Piece(NamedTuple):
    text: str
    drop: int  # number of first tokens that belong to the piece before
    last: bool  # whether the document ends here
    document: Document


class Pieces:
    """Cuts documents for a transformers tokenizer; `size`: approximate bytes of a piece."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, parts: JsonFields, size: int = PIECE) -> None:
        self.tokenizer, self.size = tokenizer, size
        marks, self.alone = marks_of(parts)
        self.barred = barred_by(parts["added_tokens"], marks)
        self.places = re.compile(f"[^\\W_](?=[{re.escape(marks)}])") if marks else None

    def of(self, document: Document) -> Iterator[Piece]:
        """The pieces of a document."""
        raw = document.raw
        start, before, drop = 0, "", 0
        while start < len(raw):
            end = self._cut(raw, start + self.size)
            text = before + raw[start:end].decode("utf-8")
            yield Piece(text, drop, end == len(raw), document)
            start, before = end, text[-1]
            drop = self._length(before) if end < len(raw) else 0

    def _cut(self, raw: bytes | bytearray, at: int) -> int:
        """The first place from `at` on where a document may be cut; the document's end if there is none."""
        while self.places is not None and at < len(raw):
            while at < len(raw) and raw[at] & 0xC0 == 0x80:  # inside a character
                at += 1
            window = raw[at : at + WINDOW].decode("utf-8", errors="ignore")  # the last character may be cut
            for match in self.places.finditer(window):
                if self._legal(match[0]):
                    return at + len(window[: match.end()].encode())
            at += max(1, len(window[:-1].encode()))  # the last character may be the x of a mark behind it
        return len(raw)

    def _legal(self, x: str) -> bool:
        normal = unicodedata.is_normalized("NFKC", x) and unicodedata.category(x)[0] in "LN"
        return normal and x not in self.barred and (self.alone is None or (x.isascii() and x in self.alone))

    def _length(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def marks_of(parts: JsonFields) -> tuple[str, Mapping[str, int] | None]:
    """The marks before which texts of a tokenizer.json may be cut ("" if that is not known), and the characters that
    may stand before a mark (None: all)."""
    model, none = parts["model"], ("", None)
    if model.get("dropout") or not all(map(_is_local, _stages(parts["normalizer"], "normalizers"))):
        return none
    stages = _stages(parts["pre_tokenizer"], "pretokenizers")
    for stage in stages:
        if marks := _ends_words(stage):
            return marks, None
        if not _may_come_first(stage):
            return none
    return _unmerged(model, stages, parts["normalizer"])


def barred_by(added: Iterable[JsonFields], marks: str) -> set[str]:
    """The characters after which an added token may end, or continue with a mark."""
    barred = set()
    for token in added:
        for content in (token["content"], unicodedata.normalize("NFKC", token["content"])):
            followed = zip(content, [*content[1:], marks[:1]], strict=False)
            barred |= {x for x, y in followed if y in marks or y == BLANK}
    return barred


def _stages(value: JsonFields | None, members: str) -> list[JsonFields]:
    if value is None:
        return []
    if value["type"] != "Sequence":
        return [value]
    return [stage for member in value[members] for stage in _stages(member, members)]


def _is_local(normalizer: JsonFields) -> bool:
    kind = normalizer["type"]
    blanks = kind == "Replace" and normalizer["pattern"] == {"String": " "} and normalizer["content"] == BLANK
    return blanks or kind in ("NFC", "NFKC") or (kind == "Prepend" and normalizer["prepend"] == BLANK)


def _ends_words(stage: JsonFields) -> str:
    """The marks before which a stage of the splitter always ends a word."""
    kind = stage["type"]
    if kind == "ByteLevel":
        return MARKS if stage.get("use_regex", True) else ""
    if kind == "Metaspace":
        return " " if stage.get("split", True) and stage["replacement"] == BLANK else ""
    if kind == "Split":
        covers_text = stage["behavior"] == "Isolated" or (stage["behavior"] == "Removed" and stage["invert"])
        known = alternatives(stage["pattern"].get("Regex", ""))
        return MARKS if covers_text and known <= WORDS and all(known & kind for kind in COVERING) else ""
    return ""


def _may_come_first(stage: JsonFields) -> bool:
    """Whether a stage splits the two sides of a cut as it splits the whole text, without ending a word there itself."""
    return stage["type"] == "Digits" or (stage["type"] == "Metaspace" and stage["replacement"] == BLANK)


def alternatives(pattern: str) -> set[str]:
    """The alternatives of a regular expression, at its outermost level."""
    parts, depth, inside, part = set(), 0, False, ""
    escaped = False
    for character in pattern:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif inside:
            inside = character != "]"
        elif character == "[":
            inside = True
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character == "|" and not depth:
            parts.add(part)
            part = ""
            continue
        part += character
    return parts | {part}


def _unmerged(
    model: JsonFields, stages: list[JsonFields], normalizer: JsonFields | None
) -> tuple[str, Mapping[str, int] | None]:
    """The marks that no token of a BPE vocabulary has after a letter or digit, and the vocabulary."""
    features = ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(name) for name in features):
        return "", None
    changing = (*_stages(normalizer, "normalizers"), *stages)
    blanks = any(stage["type"] in ("Replace", "Metaspace") for stage in changing)
    vocabulary = model["vocab"]
    merged = {y for token in vocabulary for x, y in itertools.pairwise(token) if x.isalnum()}
    spelt = {y: BLANK if y == " " and blanks else y for y in MARKS if y.isascii()}
    return "".join(y for y, as_token in spelt.items() if as_token in vocabulary and as_token not in merged), vocabulary


def batches(documents: Iterable[Document], pieces: Pieces, budget: int = 8 * PIECE) -> Iterator[list[Piece]]:
    """Batches of the pieces of documents, about `budget` characters each."""
    batch: list[Piece] = []
    characters = 0
    for piece in (piece for document in documents for piece in pieces.of(document)):
        batch.append(piece)
        characters += len(piece.text)
        if characters >= budget:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encoded(tokenizer: PreTrainedTokenizerBase, batch: list[Piece]) -> list[np.ndarray | InputError]:
    """The tokens of each piece, int64 [length], or the InputError for a piece that the tokenizer cannot take."""
    try:
        ids = tokenizer(
            [piece.text for piece in batch], add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
    except BaseException as error:  # a panic in Rust is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        if len(batch) > 1:
            return [one for piece in batch for one in encoded(tokenizer, [piece])]
        return [InputError(f"{batch[0].document.where} cannot be taken by the tokenizer: {first_line(error)}")]
    return [np.array(row[piece.drop :], np.int64) for row, piece in zip(ids, batch, strict=True)]
