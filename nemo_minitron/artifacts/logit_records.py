"""A record of a logit cache: the kept tokens of the teacher's distribution at each position of a row."""

from __future__ import annotations

import dataclasses

import numpy as np

from nemo_minitron.artifacts.cache_settings import CacheSettings
from nemo_minitron.errors import InputError


@dataclasses.dataclass(frozen=True)
class Kept:
    """The kept tokens of one row and one set, as ragged arrays: position i keeps the next `lengths[i]` of N tokens.

    `lengths` int64 [S]; `ids` int64 [N], each at most once at a position; `counts` int64 [N], 1 to draws (mode
    "sample"); `factors` float32 [N]: p / q (mode "sample" at a proposal temperature other than 1) or p (mode "top-k");
    `tail` float32 [S]: the mass of all tokens that are not kept (mode "top-k").
    """

    lengths: np.ndarray
    ids: np.ndarray
    counts: np.ndarray | None = None
    factors: np.ndarray | None = None
    tail: np.ndarray | None = None

    def weights(self, draws: int) -> np.ndarray:
        """float32 [N]: the weight of each token in the target."""
        weights = np.ones(len(self.ids)) if self.counts is None else self.counts / draws
        return (weights if self.factors is None else weights * self.factors).astype(np.float32)


class Codec:
    """Kept <-> bytes, little-endian, one part after the other.

    The parts are: lengths, uint8 [S] (uint16 if a position may keep more than 255); tokens, `width` bytes each, with
    the id in the lowest bits and count - 1 above it; factors, float32 [N]; tail, float32 [S]. `width` is the fewest
    bytes that hold both: 3 for any vocabulary up to 131,072 with up to 128 draws. A part that the mode lacks takes no
    bytes.
    """

    def __init__(self, settings: CacheSettings, vocab_size: int) -> None:
        most = settings.draws if settings.sampled else settings.k
        self.settings, self.vocab_size = settings, vocab_size
        self.id_bits = max(1, (vocab_size - 1).bit_length())
        count_bits = (settings.draws - 1).bit_length() if settings.sampled else 0
        self.width = -(-(self.id_bits + count_bits) // 8)
        self._length = np.dtype("u1" if most < 256 else "<u2")
        self._factors = not settings.sampled or settings.proposal_temperature != 1.0

    def encode(self, kept: Kept) -> bytes:
        packed = kept.ids.astype(np.uint64)
        if kept.counts is not None:
            packed |= (kept.counts - 1).astype(np.uint64) << np.uint64(self.id_bits)
        tokens = packed.astype("<u8").view(np.uint8).reshape(-1, 8)[:, : self.width]
        parts = [kept.lengths.astype(self._length), tokens]
        parts += [array.astype("<f4") for array in (kept.factors, kept.tail) if array is not None]
        return b"".join(part.tobytes() for part in parts)

    def decode(self, record: bytes) -> Kept:
        """Raises InputError if the bytes are not a record, or a number in them is not a probability."""
        rows = self.settings.sequence_length
        at = rows * self._length.itemsize
        lengths = np.frombuffer(record[:at].ljust(at, b"\0"), self._length).astype(np.int64)
        number = int(lengths.sum())
        tail = rows if not self.settings.sampled else 0
        if len(record) != at + number * (self.width + 4 * self._factors) + 4 * tail:
            raise InputError(f"a record of the cache has {len(record)} bytes, which do not fit its {number} tokens")
        wide = np.zeros((number, 8), np.uint8)
        wide[:, : self.width] = np.frombuffer(record, np.uint8, number * self.width, at).reshape(number, self.width)
        packed = wide.reshape(-1).view("<u8").astype(np.int64)
        at += number * self.width
        ids = packed & ((1 << self.id_bits) - 1)
        if number and ids.max() >= self.vocab_size:
            raise InputError("a record of the cache holds a token beyond its vocabulary; make the cache again")
        numbers = np.frombuffer(record, "<f4", (len(record) - at) // 4, at)
        if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
            raise InputError("a record of the cache holds a number that is no probability; make the cache again")
        factors = np.frombuffer(record, "<f4", number, at) if self._factors else None
        last = np.frombuffer(record, "<f4", rows, at + 4 * number) if tail else None
        counts = (packed >> self.id_bits) + 1 if self.settings.sampled else None
        return Kept(lengths, ids=ids, counts=counts, factors=factors, tail=last)
