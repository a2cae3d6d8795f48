"""Megatron's indexed files: text is tokenised once into `<prefix>.bin/.idx` and read as one stream."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import nemo_minitron.backend as backend
from nemo_minitron.artifacts import parse
from nemo_minitron.artifacts.files import parse_json
from nemo_minitron.errors import InputError
from nemo_minitron.nemo.data.index_file import read_index
from nemo_minitron.nemo.data.text import JSONL, TEXT, documents, parted
from nemo_minitron.nemo.data.vocabulary import load_tokenizer, tokenizer_digest

LARGEST_SIDECAR = 1 << 20  # bytes
NATURAL = parse.whole(0, 2**62)
SIDECAR = {
    "source": parse.text(), "documents": NATURAL, "tokens": NATURAL, "bytes": NATURAL, "eos": NATURAL,
    "dtype": parse.one_of("uint8", "int8", "int16", "int32", "int64", "uint16"), "tokenizer": parse.text(),
    "content": parse.text(),
}  # fmt: skip
BATCH = 64  # documents handed to the tokenizer at a time: it uses all cores over them


@dataclass(frozen=True)
class Corpus:
    """The sidecar `<prefix>.json`: what the tokens were made of. It is written last, and so says 'whole'."""

    source: str
    documents: int
    tokens: int  # with the end-of-document token of each document
    bytes: int  # UTF-8, of the text
    eos: int
    dtype: str
    tokenizer: str  # digest
    content: str  # digest of the documents, in order

    @classmethod
    def load(cls, prefix: Path) -> Corpus | None:
        """The sidecar of a prefix; None where there is none, and where the file is of something else, or of another
        version. Raises InputError for one of ours that is damaged."""
        file = _with(prefix, ".json")
        try:
            values = parse_json(file.read_bytes()) if file.stat().st_size <= LARGEST_SIDECAR else None
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(values, dict) or values.keys() != SIDECAR.keys():
            return None
        return cls(**parse.checked(values, parse.grouped(SIDECAR), f"the record of the tokens '{file}'"))


def prefix_of(source: str | Path) -> Path | None:
    """The prefix of Megatron's two files if `source` names them, with or without .bin or .idx; else None."""
    prefix = _bare(Path(source))
    return prefix if all(_with(prefix, end).is_file() for end in (".bin", ".idx")) else None


def held_out(source: str, split: str = "test") -> str:
    """`source`, with `@split` behind it where `datasets` would give "train": held-out text is never that."""
    name, written = parted(source)
    if written or prefix_of(name) or Path(name).suffix in (*TEXT, *JSONL):
        return source
    return f"{source}@{split}"


def build(
    source: str | Path, tokenizer: Any, prefix: str | Path, split: str | None = None, field: str = "text"
) -> Tokens:
    """Tokenises a source into `<prefix>.bin/.idx/.json` unless the same is there already; opens it.

    One document each, no BOS, the tokenizer's EOS after each; uint16 where the vocabulary allows, else
    int32. Same documents and tokenizer, by digest: nothing is written. A source that is such files already
    is opened where it lies. For one process: let it run before the others start, or behind a barrier.

    Raises InputError: as `documents` does; no EOS; indexed files made with another tokenizer.
    """
    tokenizer = load_tokenizer(tokenizer)
    there = prefix_of(source)
    if there is not None:
        check_tokenizer(there, tokenizer)
        return Tokens(there)
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-sequence token to put after a document: set eos_token")
    prefix = _bare(Path(prefix))
    if not _fresh(prefix, tokenizer, lambda: documents(source, split, field)):
        _write(source, tokenizer, prefix, split, field)
    return Tokens(prefix)


class Tokens:
    """One stream of tokens: the documents of `<prefix>.bin/.idx`, end to end, each closed by its EOS.

    The file is mapped, not read; every process sees the same stream and the same windows in every layout.
    Raises InputError where the two files are missing or do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        found = prefix_of(prefix)
        if found is None:
            raise InputError(f"'{prefix}' is no Megatron prefix: '{prefix}.bin' and '{prefix}.idx' are needed")
        self.prefix = found
        self.corpus = Corpus.load(found)
        self._ends, dtype = read_index(_with(found, ".idx"), _with(found, ".bin").stat().st_size)
        self.tokens = int(self._ends[-1]) if len(self._ends) else 0
        self._stream = np.memmap(_with(found, ".bin"), dtype=dtype, mode="r") if self.tokens else np.empty(0)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._ends)

    def __getitem__(self, document: int) -> np.ndarray:
        """The tokens of one document, 0 to len - 1: int64 [length], its EOS last."""
        if not 0 <= document < len(self):
            raise IndexError(document)
        start = int(self._ends[document - 1]) if document else 0
        return self.stream(start, int(self._ends[document]) - start)

    def samples(self, sequence_length: int) -> int:
        """How many whole windows of that length there are; the tail of the stream is left out."""
        return self.tokens // sequence_length

    def windows(self, sequence_length: int, samples: int | None = None, seed: int | None = None) -> Any:
        """Contiguous windows of the stream that do not overlap: torch.int64 [samples, sequence_length].

        Without a seed the first ones in order; with one, drawn without replacement, so that fewer samples
        of the same seed are the first of more. All of them where `samples` is None.
        Raises InputError when the corpus has fewer than asked, or none.
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

    def _refuse_short(self, sequence_length: int, total: int, samples: int | None) -> None:
        if total == 0:
            raise InputError(
                f"the corpus gives no sample of {sequence_length} tokens, it has {self.tokens}: "
                f"give --sequence-length {self.tokens} or less, or a larger corpus"
            )
        if samples is not None and not 0 < samples <= total:
            raise InputError(
                f"the corpus gives {total} samples of {sequence_length} tokens, {samples} were asked for: "
                f"give --samples {total if samples > 0 else 1} or a larger corpus"
            )


def check_tokenizer(prefix: Path, tokenizer: Any) -> None:
    """InputError if the sidecar of a prefix says that another tokenizer made it; silent without a sidecar."""
    made = Corpus.load(prefix)
    if made is not None and made.tokenizer != tokenizer_digest(tokenizer):
        raise InputError(f"'{prefix}' was tokenised from '{made.source}' with another tokenizer: give the text instead")


def _write(source: str | Path, tokenizer: Any, prefix: Path, split: str | None, field: str) -> None:
    """Writes the three files beside their names, then renames them; the sidecar goes first and comes last."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{prefix.name}.", dir=prefix.parent) as folder:
        partial = Path(folder) / prefix.name
        corpus = _tokenise(source, tokenizer, partial, split, field)
        _with(partial, ".json").write_text(json.dumps(asdict(corpus), indent=2) + "\n")
        _with(prefix, ".json").unlink(missing_ok=True)
        for end in (".bin", ".idx", ".json"):
            os.replace(_with(partial, end), _with(prefix, end))


def _megatron() -> Any:
    """Megatron's module; without `setup` it does not import where Transformer Engine is installed and cannot run."""
    backend.setup()
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def _tokenise(source: str | Path, tokenizer: Any, prefix: Path, split: str | None, field: str) -> Corpus:
    dtype = _megatron().DType.optimal_dtype(len(tokenizer))
    builder = _megatron().IndexedDatasetBuilder(str(_with(prefix, ".bin")), dtype=dtype)
    digest, count, tokens, size = hashlib.sha256(), 0, 0, 0
    texts = documents(source, split, field)
    while batch := list(islice(texts, BATCH)):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for text, ids in zip(batch, encoded["input_ids"], strict=True):
            ids.append(tokenizer.eos_token_id)
            builder.add_document(ids, [len(ids)])
            tokens += len(ids)
            size += _add(digest, text)
        count += len(batch)
    builder.finalize(str(_with(prefix, ".idx")))
    return Corpus(
        source=str(source),
        documents=count,
        tokens=tokens,
        bytes=size,
        eos=tokenizer.eos_token_id,
        dtype=np.dtype(dtype).name,
        tokenizer=tokenizer_digest(tokenizer),
        content=digest.hexdigest(),
    )


def _digest_of(texts: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        _add(digest, text)
    return digest.hexdigest()


def _add(digest: Any, text: str) -> int:
    """Adds one document, its length before it so that its borders count; returns its bytes."""
    raw = text.encode()
    digest.update(len(raw).to_bytes(8, "little"))
    digest.update(raw)
    return len(raw)


def _fresh(prefix: Path, tokenizer: Any, texts: Callable[[], Iterator[str]]) -> bool:
    """Whether the files are there, as long as the sidecar says, of this tokenizer and of these texts."""
    made = Corpus.load(prefix)
    if made is None or prefix_of(prefix) is None or made.tokenizer != tokenizer_digest(tokenizer):
        return False
    if _with(prefix, ".bin").stat().st_size != made.tokens * np.dtype(made.dtype).itemsize:
        return False
    return made.content == _digest_of(texts())


def _bare(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def _with(prefix: Path, ending: str) -> Path:
    """Megatron's way: the ending is put behind the whole name, dots and all."""
    return prefix.with_name(prefix.name + ending)
