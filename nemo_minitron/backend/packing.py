"""Packed sequences: several samples in one row. Megatron's `PackedSeqParams` in the format 'thd' separates them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import Tensor

from nemo_minitron.errors import InputError


def check(packed: Any, context_parallel_size: int) -> None:
    """Raises InputError for a format other than 'thd', and under context parallelism."""
    if packed.qkv_format != "thd":
        raise InputError(f"packed sequences of format '{packed.qkv_format}' are not supported; legal is 'thd'")
    if context_parallel_size > 1:
        raise InputError(
            f"packed sequences with context_parallel_size={context_parallel_size} need Transformer Engine on a GPU; "
            "legal here is 1"
        )


def segments(packed: Any) -> Iterator[tuple[slice, slice]]:
    """The places of each sample's tokens among the queries and among the keys, without padding and empty samples."""
    queries = _spans(packed.cu_seqlens_q, packed.cu_seqlens_q_padded)
    keys = _spans(packed.cu_seqlens_kv, packed.cu_seqlens_kv_padded)
    for query, key in zip(queries, keys, strict=True):
        if query.stop > query.start:
            yield query, key


def _spans(cumulative: Tensor, padded: Tensor | None) -> list[slice]:
    starts = cumulative if padded is None else padded
    lengths = [end - start for start, end in pairwise(cumulative.tolist())]
    return [slice(start, start + length) for start, length in zip(starts.tolist(), lengths, strict=False)]
