"""What writes Megatron's indexed files, a document in pieces at a time, and what is counted of the documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import nemo_minitron.backend as backend
from nemo_minitron.data.lines import Document


class Writer:
    """Megatron's builder of indexed files, given a document in pieces: its own `add_document` wants it whole."""

    def __init__(self, prefix: Path, ids: int) -> None:
        self.dtype = megatron().DType.optimal_dtype(ids)
        self.builder = megatron().IndexedDatasetBuilder(str(with_ending(prefix, ".bin")), dtype=self.dtype)
        self.tokens = self.length = 0  # of the documents that are closed, and of the one that is open
        self.broken = False  # a piece of the open document is missing

    def add(self, ids: np.ndarray) -> None:
        self.builder.data_file.write(ids.astype(self.dtype).tobytes())
        self.length += len(ids)

    def close(self, eos: int) -> bool:
        """Ends a document; one that is broken is taken back, and False given."""
        broken, self.broken = self.broken, False
        if broken:
            self.builder.data_file.seek(self.tokens * np.dtype(self.dtype).itemsize)
            self.builder.data_file.truncate()
        else:
            self.add(np.array([eos]))
            self.builder.sequence_lengths.append(self.length)
            self.builder.document_indices.append(len(self.builder.sequence_lengths))
            self.tokens += self.length
        self.length = 0
        return not broken


class Content:
    """Documents as they pass: how many, their bytes, and a digest in which their borders count."""

    def __init__(self, texts: Iterator[Document]) -> None:
        self.texts, self.digest, self.documents, self.bytes = texts, hashlib.sha256(), 0, 0

    def __iter__(self) -> Iterator[Document]:
        for document in self.texts:
            self.digest.update(len(document.raw).to_bytes(8, "little"))
            self.digest.update(document.raw)
            self.documents += 1
            self.bytes += len(document.raw)
            yield document

    def forget(self, document: Document) -> None:
        """Counts a document no longer; the digest is of what was read."""
        self.documents -= 1
        self.bytes -= len(document.raw)


def digest_of(texts: Iterator[Document]) -> str:
    content = Content(texts)
    for _ in content:
        pass
    return content.digest.hexdigest()


def megatron() -> Any:
    """Megatron's module; without `setup` it does not import where Transformer Engine is installed and cannot run."""
    backend.setup()
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def with_ending(prefix: Path, ending: str) -> Path:
    """Megatron's way: the ending is put behind the whole name, dots and all."""
    return prefix.with_name(prefix.name + ending)
