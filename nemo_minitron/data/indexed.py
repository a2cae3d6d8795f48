"""Megatron's indexed files: text is tokenised once into `<prefix>.bin/.idx` and read as one stream."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_minitron.artifacts import parse
from nemo_minitron.artifacts.files import naming, parse_json, sync_tree
from nemo_minitron.artifacts.temporary import beside
from nemo_minitron.data.index_file import read_index
from nemo_minitron.data.index_writer import Content, Writer, digest_of, with_ending
from nemo_minitron.data.lines import Document
from nemo_minitron.data.pieces import Pieces, batches, encoded
from nemo_minitron.data.text import BadLines, raw_documents, source_of
from nemo_minitron.data.vocabulary import chat_template, load_tokenizer, parts_of, tokenizer_digest
from nemo_minitron.errors import InputError
from nemo_minitron.families.tokenizer import check_ids, largest_id
from nemo_minitron.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

CHUNK = 1 << 22  # tokens that are checked at a time
LARGEST_SIDECAR = 1 << 20  # bytes
NATURAL = parse.whole(0, 2**62)
SIDECAR = {
    "source": parse.text(), "documents": NATURAL, "tokens": NATURAL, "bytes": NATURAL, "eos": NATURAL,
    "dtype": parse.one_of("uint8", "int8", "int16", "int32", "int64", "uint16"), "tokenizer": parse.text(),
    "content": parse.text(),
}  # fmt: skip
SKIPPED = {"skipped": NATURAL, "first_skipped": parse.text()}


@dataclass(frozen=True)
class Corpus:
    """The sidecar `<prefix>.json`: how the tokens were made. It is written last, so its presence marks complete
    files."""

    source: str
    documents: int
    tokens: int  # including the end-of-document token of each document
    bytes: int  # UTF-8, of the text
    eos: int
    dtype: str
    tokenizer: str  # digest
    content: str  # digest of the documents, in order
    skipped: int = 0  # number of bad lines that were left out
    first_skipped: str = ""  # what was wrong with the first of them

    @classmethod
    def load(cls, prefix: Path) -> Corpus | None:
        """The sidecar of a prefix; None if the file is missing, belongs to something else, or has another version.

        Raises InputError if it is a damaged sidecar."""
        file = with_ending(prefix, ".json")
        try:
            values = parse_json(file.read_bytes()) if file.stat().st_size <= LARGEST_SIDECAR else None
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(values, dict) or not SIDECAR.keys() <= values.keys() <= (SIDECAR | SKIPPED).keys():
            return None
        return cls(**parse.checked(values, parse.grouped(SIDECAR, SKIPPED), f"the record of the tokens '{file}'"))


def prefix_of(source: str | Path) -> Path | None:
    """The prefix of Megatron's two files if `source` names them, with or without .bin or .idx; else None."""
    prefix = _bare(Path(source))
    return prefix if all(with_ending(prefix, end).is_file() for end in (".bin", ".idx")) else None


def held_out(source: str, split: str = "test") -> str:
    """`source`, with a split appended if `datasets` would choose "train" by itself: that is never held-out text."""
    parts = source_of(source)
    if parts.split or prefix_of(parts.name) or parts.is_file:
        return source
    return f"{parts.name}@{split}" + (f"::{parts.field}" if parts.field else "")


def build(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, prefix: str | Path, split: str | None = None,
    field: str = "text", *, vocab_size: int | None = None, skip_bad_lines: bool = False,
) -> Tokens:  # fmt: skip
    """Tokenises a source into `<prefix>.bin/.idx/.json`, unless these hold the same already; opens the result.

    Each document gets no BOS and is followed by the tokenizer's EOS; tokens are uint16 if the vocabulary allows it,
    else int32. If the digests of documents and tokenizer match, nothing is written. A source that consists of such
    files is opened in place. Only one process may call this: before the others start, or behind a barrier. A long
    document is tokenised in pieces if that provably gives the same tokens (`pieces.py`). `vocab_size`: the vocabulary
    of the model that will read the tokens; every token is checked against it. `skip_bad_lines`: lines that cannot be
    read are left out, and counted in `corpus.skipped`.

    Raises InputError: as `documents` does; if the tokenizer has no EOS; for indexed files made with another tokenizer;
    for a token that the model has no row for.
    """
    tokenizer = load_tokenizer(tokenizer)
    indexed = prefix_of(source)
    if indexed is not None:
        check_tokenizer(indexed, tokenizer)
        return Tokens(indexed).checked(vocab_size)
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-sequence token to put after a document: set eos_token")
    prefix = _bare(Path(prefix))

    def texts() -> tuple[Iterator[Document], BadLines]:
        bad = BadLines(skip_bad_lines)
        return raw_documents(source, split, field, bad, chat_template(tokenizer)), bad

    if not _fresh(prefix, tokenizer, *texts()):
        _write(str(source), tokenizer, prefix, *texts(), vocab_size)
    return Tokens(prefix).checked(vocab_size)


class Tokens:
    """One stream of tokens: the documents of `<prefix>.bin/.idx` one after another, each ended by its EOS.

    The file is mapped, not read. Every process sees the same stream, and the same windows, in every layout.
    Raises InputError if the two files are missing or do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        bare_prefix = prefix_of(prefix)
        if bare_prefix is None:
            raise InputError(f"'{prefix}' is not a Megatron prefix: '{prefix}.bin' and '{prefix}.idx' are needed")
        self.prefix = bare_prefix
        self.corpus = Corpus.load(bare_prefix)
        self._ends, dtype = read_index(
            with_ending(bare_prefix, ".idx"), with_ending(bare_prefix, ".bin").stat().st_size
        )
        self.tokens = int(self._ends[-1]) if len(self._ends) else 0
        self._stream = (
            np.memmap(with_ending(bare_prefix, ".bin"), dtype=dtype, mode="r") if self.tokens else np.empty(0)
        )

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._ends)

    def __getitem__(self, document: int) -> np.ndarray:
        """The tokens of one document, 0 to len - 1: int64 [length], its EOS last."""
        if not 0 <= document < len(self):
            raise IndexError(document)
        start = int(self._ends[document - 1]) if document else 0
        return self.stream(start, int(self._ends[document]) - start)

    def checked(self, vocab_size: int | None) -> Tokens:
        """This stream, after one pass over all its tokens; `vocab_size` None: no check.

        Raises InputError for a token that a model of this vocabulary has no row for. On one rank such a token would
        be an IndexError; on several ranks it would silently become a row of zeros."""
        for start in range(0, self.tokens if vocab_size is not None else 0, CHUNK):
            chunk = self._stream[start : start + CHUNK]
            for token in (int(chunk.max()), int(chunk.min())):
                if not 0 <= token < (vocab_size or 0):
                    place = start + int((chunk == token).argmax())
                    raise InputError(
                        f"'{self.prefix}.bin' holds the token {token}, at place {place}, and the model has rows for 0 "
                        f"to {(vocab_size or 0) - 1}: it was made with another tokenizer, or with tokens that were "
                        "added without resizing the embedding"
                    )
        return self

    def samples(self, sequence_length: int) -> int:
        """The number of full windows of that length; the rest of the stream is left out."""
        return self.tokens // sequence_length

    def windows(self, sequence_length: int, samples: int | None = None, seed: int | None = None) -> Tensor:
        """Contiguous windows of the stream that do not overlap: torch.int64 [samples, sequence_length].

        Without a seed they are the first windows, in order. With a seed they are drawn without replacement, so that
        fewer samples of the same seed are the first of more. `samples` None: all windows.
        Raises InputError if the corpus has fewer windows than `samples`, or none.
        """
        import torch

        total = self.samples(sequence_length)
        self._refuse_short(sequence_length, total, samples)
        if seed is None:
            chosen = np.arange(total)
        else:
            chosen = np.random.default_rng(seed).permutation(total)
        rows = torch.empty(total if samples is None else samples, sequence_length, dtype=torch.int64)
        for row, window in zip(rows, chosen, strict=False):
            row.copy_(torch.from_numpy(self.stream(int(window) * sequence_length, sequence_length)))
        return rows

    def stream(self, start: int, length: int) -> np.ndarray:
        """Tokens start to start + length of the whole stream: int64 [length]."""
        return self._stream[start : start + length].astype(np.int64)

    def check_rows(self, sequence_length: int, samples: int) -> None:
        """Raises InputError if the corpus has fewer than `samples` rows of that length, each with its last label."""
        self._refuse_short(sequence_length, self.samples(sequence_length + 1), samples, label=1)

    def _refuse_short(self, sequence_length: int, total: int, samples: int | None, label: int = 0) -> None:
        if total == 0:
            raise InputError(
                f"the corpus gives no sample of {sequence_length} tokens, it has {self.tokens}: "
                f"give --sequence-length {max(1, self.tokens - label)} or less, or a larger corpus"
            )
        if samples is not None and not 0 < samples <= total:
            raise InputError(
                f"the corpus gives {total} samples of {sequence_length} tokens, {samples} were asked for: "
                f"give --samples {total if samples > 0 else 1} or a larger corpus"
            )


def check_tokenizer(prefix: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError if the sidecar of a prefix names another tokenizer; does nothing without a sidecar."""
    corpus = Corpus.load(prefix)
    if corpus is not None and corpus.tokenizer != tokenizer_digest(tokenizer):
        raise InputError(
            f"'{prefix}' was tokenised from '{corpus.source}' with another tokenizer: give the text instead"
        )


def _write(
    source: str, tokenizer: PreTrainedTokenizerBase, prefix: Path, texts: Iterator[Document], bad: BadLines,
    vocab_size: int | None,
) -> None:  # fmt: skip
    """Writes three temporary files, then renames them. The old sidecar is removed first and the new one comes last."""
    with naming(prefix), beside(prefix) as folder:
        partial = folder / prefix.name
        corpus = _tokenise(source, tokenizer, partial, texts, bad, vocab_size)
        with_ending(partial, ".json").write_text(json.dumps(asdict(corpus), indent=2) + "\n")
        with_ending(prefix, ".json").unlink(missing_ok=True)
        sync_tree(folder)
        for end in (".bin", ".idx", ".json"):
            os.replace(with_ending(partial, end), with_ending(prefix, end))


def _tokenise(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Path,
    texts: Iterator[Document],
    bad: BadLines,
    vocab_size: int | None,
) -> Corpus:
    content, out = Content(texts), Writer(prefix, largest_id(tokenizer) + 1)
    with Progress("tokenise:", "tokens") as progress:
        for batch in batches(content, Pieces(tokenizer, parts_of(tokenizer))):
            for piece, ids in zip(batch, encoded(tokenizer, batch), strict=True):
                if isinstance(ids, InputError):
                    bad.take(ids)
                    out.broken = True
                else:
                    check_ids(ids, tokenizer, vocab_size, source)
                    out.add(ids)
                if piece.last and not out.close(tokenizer.eos_token_id):
                    content.forget(piece.document)
            progress(out.tokens)
    check_ids(np.array([tokenizer.eos_token_id]), tokenizer, vocab_size, source)
    out.builder.finalize(str(with_ending(prefix, ".idx")))
    return Corpus(
        source=source,
        documents=content.documents,
        tokens=out.tokens,
        bytes=content.bytes,
        eos=tokenizer.eos_token_id,
        dtype=np.dtype(out.dtype).name,
        tokenizer=tokenizer_digest(tokenizer),
        content=content.digest.hexdigest(),
        skipped=bad.count,
        first_skipped=bad.first,
    )


def _fresh(prefix: Path, tokenizer: PreTrainedTokenizerBase, texts: Iterator[Document], bad: BadLines) -> bool:
    """Whether complete files of this tokenizer and these texts exist already."""
    corpus = Corpus.load(prefix)
    if corpus is not None and corpus.skipped and not bad.skip:
        return False
    if corpus is None or prefix_of(prefix) is None or corpus.tokenizer != tokenizer_digest(tokenizer):
        return False
    if with_ending(prefix, ".bin").stat().st_size != corpus.tokens * np.dtype(corpus.dtype).itemsize:
        return False
    return corpus.content == digest_of(texts)


def _bare(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path
