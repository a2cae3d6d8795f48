"""The files of a logit cache: every kind of record there and back, found by its tokens, refused where it is not whole.

Mutations tried by hand, each of which makes tests here fail: the count stored instead of count - 1 (all
draws on one token overflow); records sought right behind the ends, without the keys; keys searched unsorted.
"""

import json

import numpy as np
import pytest

from nemo_minitron.artifacts.cache_settings import CacheSettings
from nemo_minitron.artifacts.logit_cache import (
    HEADER,
    CacheHeader,
    LogitCache,
    data_digest,
    row_key,
    shard_path,
    torn,
    write_shard,
)
from nemo_minitron.artifacts.logit_records import Codec, Kept
from nemo_minitron.errors import InputError

SETTINGS = {
    "count": CacheSettings(sequence_length=6, draws=128),
    "factors": CacheSettings(sequence_length=6, draws=7, proposal_temperature=2.0),
    "sets": CacheSettings(sequence_length=6, draws=300, sets=3),
    "top-k": CacheSettings(sequence_length=6, mode="top-k", k=5),
}
each_kind = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def kept(settings, vocab_size, random):
    """Random tokens; the first position has one token alone, the largest id, of all draws."""
    most = min(4, vocab_size, settings.draws)
    lengths = random.integers(1, most + 1, settings.sequence_length)
    lengths[0] = 1
    if not settings.sampled:
        lengths[:] = settings.k
    ids = np.concatenate([random.choice(vocab_size, n, replace=False) for n in lengths])
    counts = random.integers(1, settings.draws + 1, len(ids))
    ids[0], counts[0] = vocab_size - 1, settings.draws
    factors, tail = (random.random(n).astype(np.float32) for n in (len(ids), settings.sequence_length))
    if not settings.sampled:
        return Kept(lengths, ids, None, factors, tail)
    return Kept(lengths, ids, counts, factors if settings.proposal_temperature != 1 else None)


def equal(a, b):
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("lengths", "ids", "counts", "factors", "tail")]
    return all((x is None and y is None) or np.array_equal(x, y) for x, y in pairs)


@each_kind
@pytest.mark.parametrize("vocab_size", [2, 509, 49_152, 131_072, 256_000])
def test_records_come_back_as_they_were(settings, vocab_size):
    if not settings.sampled and vocab_size < settings.k:
        return
    given = kept(settings, vocab_size, np.random.default_rng(vocab_size))
    codec = Codec(settings, vocab_size)
    record = codec.encode(given)
    assert equal(codec.decode(record), given)
    with pytest.raises(InputError, match="do not fit"):
        codec.decode(record[:-1])


@pytest.mark.parametrize(
    ("vocab_size", "draws", "width"),
    [(131_072, 128, 3), (131_073, 128, 4), (131_072, 129, 4), (65_536, 1, 2), (509, 128, 2), (151_936, 64, 3)],
)
def test_a_token_takes_the_fewest_bytes_that_hold_id_and_count(vocab_size, draws, width):
    assert Codec(CacheSettings(draws=draws), vocab_size).width == width


def test_weights_are_counts_over_draws_and_ratios_not_normalised():
    lengths, ids = np.array([2]), np.array([3, 4])
    counts, factors = np.array([1, 3]), np.array([2.0, 0.5], np.float32)
    assert np.allclose(Kept(lengths, ids, counts).weights(4), [0.25, 0.75])
    assert np.allclose(Kept(lengths, ids, counts, factors).weights(4), [0.5, 0.375])
    assert np.allclose(Kept(lengths, ids, None, factors).weights(4), factors)


def made(folder, settings, rows=7, rows_per_shard=3, shards=None):
    """A cache of random rows; gives the rows' tokens and what each keeps in each set."""
    random = np.random.default_rng(1)
    tokens = random.integers(0, 509, (rows, settings.sequence_length))
    held = [[kept(settings, 509, random) for _ in range(settings.stored_sets)] for _ in tokens]
    header = CacheHeader(settings, "teacher", data_digest(lambda i: tokens[i], rows, 6), 509, rows, rows_per_shard)
    folder.mkdir()
    header.save(folder)
    codec = Codec(settings, 509)
    for shard in range(header.shards) if shards is None else shards:
        part = header.rows_of(shard)
        records = [[codec.encode(one) for one in held[row]] for row in part]
        write_shard(shard_path(folder, shard), [row_key(tokens[row]) for row in part], records)
    return tokens, held


@each_kind
def test_rows_are_found_in_any_order_by_their_tokens(settings, tmp_path):
    tokens, held = made(tmp_path / "cache", settings)
    cache = LogitCache(tmp_path / "cache")
    for row in np.random.default_rng(2).permutation(len(tokens)):
        assert cache.find(tokens[row].astype(np.int64)) == row
        for epoch in range(5):
            assert equal(cache.read(row, epoch), held[row][epoch % settings.stored_sets])
    changed = tokens[3].copy()
    changed[-1] ^= 1
    with pytest.raises(InputError, match="lacks a row of 6 tokens"):
        cache.find(changed)


def test_the_digest_is_of_what_decides_the_numbers(tmp_path):
    base = CacheHeader(CacheSettings(), "m", "d", 509, 7)
    other = {
        CacheHeader(CacheSettings(**{name: value}), "m", "d", 509, 7).digest
        for name, value in {
            "mode": "top-k", "draws": 51, "independent": True, "proposal_temperature": 2.0, "sets": 2, "seed": 1,
            "temperature": 2.0, "precision": "fp32", "sequence_length": 8,
        }.items()
    }  # fmt: skip
    for which in [("n", "d", 509), ("m", "e", 509), ("m", "d", 8)]:
        other.add(CacheHeader(CacheSettings(), *which, 7).digest)
    assert len(other | {base.digest}) == 13
    same = [CacheHeader(CacheSettings(k=3), "m", "d", 509, 7), CacheHeader(CacheSettings(), "m", "d", 509, 7, 2)]
    assert {header.digest for header in same} == {base.digest}
    base.save(tmp_path)
    assert CacheHeader.load(tmp_path) == base


def test_the_digest_of_a_text_sees_rows_their_number_and_length():
    rows = np.arange(70 * 8).reshape(70, 8)
    base = data_digest(lambda i: rows[i], 70, 8)
    other = rows.copy()
    other[69, 7] += 1
    assert base == data_digest(lambda i: rows.astype(np.uint16)[i], 70, 8)
    assert len({base, data_digest(lambda i: other[i], 70, 8), data_digest(lambda i: rows[i], 69, 8)}) == 3


def test_what_is_not_whole_is_refused(tmp_path):
    settings = SETTINGS["count"]
    made(tmp_path / "part", settings, shards=[0, 2])
    with pytest.raises(InputError, match="2 of its 3 shards; run the same"):
        LogitCache(tmp_path / "part")
    made(tmp_path / "cut", settings)
    file = shard_path(tmp_path / "cut", 1)
    for size in (file.stat().st_size - 1, 40, 3):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(InputError, match=r"shard-00001\.logits' is damaged"):
            LogitCache(tmp_path / "cut")
        assert torn(tmp_path / "cut", CacheHeader.load(tmp_path / "cut")) == [file]
    with pytest.raises(InputError, match="does not exist"):
        LogitCache(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"rows": 6}, "changed by hand"), ({"model": "x"}, "changed by hand"), ({"rows_per_shard": 4}, "damaged"),
     ({"version": 9}, "no logit cache of version 1"),
     ({"settings": {"mode": "sampel"}}, "did you mean 'sample'"), ({"surplus": 1}, "holds no logit cache")],
)  # fmt: skip
def test_headers_that_are_not_ours_are_refused(change, words, tmp_path):
    made(tmp_path / "cache", SETTINGS["count"])
    file = tmp_path / "cache" / HEADER
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=words):
        LogitCache(tmp_path / "cache")


@pytest.mark.parametrize(
    ("expected", "words"),
    [({"model": "student"}, "is of another teacher"), ({"data": "novel"}, "is of other text"),
     ({"vocab_size": 512}, "has vocab_size 509, not 512"), ({"temperature": 2.0}, "has temperature 1.0, not 2.0")],
)  # fmt: skip
def test_another_model_text_vocabulary_or_setting_is_refused(expected, words, tmp_path):
    made(tmp_path / "cache", SETTINGS["count"])
    header = CacheHeader.load(tmp_path / "cache")
    header.check("cache", model="teacher", vocab_size=509, temperature=1.0)
    with pytest.raises(InputError, match=words):
        header.check("cache", **expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [({"draws": 0}, "draws is 0; the nearest legal value is 1"), ({"k": 70_000}, "nearest legal value is 65535"),
     ({"seed": -1}, "nearest legal value is 0"), ({"temperature": 0.0}, "temperature is 0.0; it must be"),
     ({"proposal_temperature": float("inf")}, "must be a number above 0")],
)  # fmt: skip
def test_settings_that_are_not_legal_are_refused(given, words):
    with pytest.raises(InputError, match=words):
        CacheSettings(**given)
