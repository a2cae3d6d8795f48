"""Writes Megatron's indexed files, one piece of a document at a time, and counts the documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import nemo_minitron.backend as backend
from nemo_minitron.data.lines import Document

if TYPE_CHECKING:
    from types import ModuleType


class Writer:
    """Feeds a document in pieces to Megatron's builder of indexed files, whose `add_document` needs the whole
    document."""

    def __init__(self, prefix: Path, ids: int) -> None:
        self.dtype = megatron().DType.optimal_dtype(ids)
        self.builder = megatron().IndexedDatasetBuilder(str(with_ending(prefix, ".bin")), dtype=self.dtype)
        self.tokens = self.length = 0  # in the closed documents, and in the open one
        self.broken = False  # a piece of the open document is missing

    def add(self, ids: np.ndarray) -> None:
        self.builder.data_file.write(ids.astype(self.dtype).tobytes())
        self.length += len(ids)

    def close(self, eos: int) -> bool:
        """Ends a document and returns True; a broken one is removed again, and the result is False."""
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
    """Passes documents on; counts them and their bytes, and computes a digest that depends on their borders."""

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
        """Takes a document out of the counts; it stays in the digest, which covers all that was read."""
        self.documents -= 1
        self.bytes -= len(document.raw)


def digest_of(texts: Iterator[Document]) -> str:
    """The digest of documents, in hex, as `Content` computes it."""
    content = Content(texts)
    for _ in content:
        pass
    return content.digest.hexdigest()


def megatron() -> ModuleType:
    """Megatron's module of indexed files. Without `setup` the import fails if Transformer Engine is installed but
    cannot run."""
    backend.setup()
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def with_ending(prefix: Path, ending: str) -> Path:
    """Appends the ending to the whole name, dots included, as Megatron does."""
    return prefix.with_name(prefix.name + ending)
