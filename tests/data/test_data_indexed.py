"""Megatron's indexed files: written as tokenised by hand, kept while true, read as windows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from corpora import write_indexed

from nemo_minitron.data import Tokens, build, prefix_of
from nemo_minitron.errors import InputError

EOS = 1


@pytest.fixture
def by_hand(byte_level, texts):
    """The stream as it must be: int64 [tokens]."""
    ids = [byte_level(text, add_special_tokens=False)["input_ids"] + [EOS] for text in texts]
    return np.concatenate(ids)


@pytest.fixture
def built(jsonl, byte_level, tmp_path):
    return build(jsonl, byte_level, tmp_path / "out" / "v1.0")


def test_the_files_hold_the_tokens_made_by_hand(built, by_hand, byte_level, texts):
    assert len(built) == len(texts)
    assert built.tokens == len(by_hand)
    np.testing.assert_array_equal(built.stream(0, built.tokens), by_hand)
    for i, text in enumerate(texts):
        np.testing.assert_array_equal(built[i][:-1], byte_level(text, add_special_tokens=False)["input_ids"])
        assert built[i][-1] == EOS
    assert 0 not in by_hand  # no BOS


def test_megatron_reads_the_same(built, by_hand):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(built.prefix))
    assert dataset.index.dtype == np.uint16
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    np.testing.assert_array_equal(np.concatenate(dataset[0 : len(dataset)]), by_hand)


def test_a_large_vocabulary_gets_int32(jsonl, byte_level, tmp_path):
    import copy

    tokenizer = copy.deepcopy(byte_level)
    tokenizer.add_tokens([f"@{i}@" for i in range(65_100)])
    large = build(jsonl, tokenizer, tmp_path / "large")
    assert large.corpus.dtype == "int32"
    assert large[0][-1] == EOS


def test_the_sidecar_says_what_was_made(built, texts):
    sidecar = json.loads(built.prefix.with_name("v1.0.json").read_text())
    assert sidecar["documents"] == len(texts)
    assert sidecar["tokens"] == built.tokens
    assert sidecar["bytes"] == sum(len(text.encode()) for text in texts)
    assert sorted(p.name for p in built.prefix.parent.iterdir()) == ["v1.0.bin", "v1.0.idx", "v1.0.json"]


def stamp(tokens):
    return tokens.prefix.with_name(tokens.prefix.name + ".bin").stat().st_ino


def test_the_same_again_writes_nothing(built, jsonl, byte_level):
    before = stamp(built)
    assert stamp(build(jsonl, byte_level, built.prefix)) == before
    assert stamp(build(jsonl, byte_level, built.prefix.with_name("v1.0.bin"))) == before


def test_another_text_tokenizer_or_broken_file_is_built_anew(built, jsonl, byte_level, sentencepiece):
    before, tokens = stamp(built), built.tokens
    with built.prefix.with_name("v1.0.bin").open("ab") as file:
        file.write(b"\0\0")
    rebuilt = build(jsonl, byte_level, built.prefix)
    assert (stamp(rebuilt) != before, rebuilt.tokens) == (True, tokens)
    before = stamp(rebuilt)
    jsonl.write_text(jsonl.read_text() + '{"text": "one more"}\n')
    longer = build(jsonl, byte_level, built.prefix)
    assert (stamp(longer) != before, len(longer)) == (True, len(built) + 1)
    before = stamp(longer)
    assert stamp(build(jsonl, sentencepiece, built.prefix)) != before


def test_a_refusal_leaves_what_was_there(built, jsonl, byte_level):
    before = stamp(built)
    jsonl.write_text(jsonl.read_text() + "{broken\n")
    with pytest.raises(InputError, match="not JSON"):
        build(jsonl, byte_level, built.prefix)
    assert stamp(built) == before
    assert len(Tokens(built.prefix)) == len(built)
    assert len(list(built.prefix.parent.iterdir())) == 3


def test_indexed_files_are_opened_where_they_lie(built, byte_level, sentencepiece, tmp_path):
    for source in (built.prefix, f"{built.prefix}.bin", f"{built.prefix}.idx"):
        assert prefix_of(source) == built.prefix
        assert build(source, byte_level, tmp_path / "unused").prefix == built.prefix
    assert not (tmp_path / "unused.bin").exists()
    with pytest.raises(InputError, match="another tokenizer"):
        build(built.prefix, sentencepiece, tmp_path / "unused")
    built.prefix.with_name("v1.0.json").unlink()  # a stranger's files: nothing to compare with
    assert build(built.prefix, sentencepiece, tmp_path / "unused").corpus is None


def test_windows_in_order_are_the_stream(built, by_hand):
    rows = built.windows(32)
    assert rows.dtype == torch.int64
    assert rows.shape == (len(by_hand) // 32, 32)
    np.testing.assert_array_equal(rows.flatten().numpy(), by_hand[: rows.numel()])
    assert torch.equal(built.windows(32, 3), rows[:3])


def test_windows_with_a_seed_are_drawn_without_replacement(built):
    every = {tuple(row.tolist()) for row in built.windows(8)}
    drawn = built.windows(8, seed=7)
    assert {tuple(row.tolist()) for row in drawn} == every
    assert not torch.equal(drawn, built.windows(8))
    assert torch.equal(built.windows(8, 5, seed=7), drawn[:5])
    assert torch.equal(Tokens(built.prefix).windows(8, 5, seed=7), drawn[:5])
    assert not torch.equal(built.windows(8, seed=8), drawn)


def test_a_corpus_too_short_is_refused_with_what_it_can_give(built):
    total = built.samples(32)
    with pytest.raises(InputError, match=f"gives {total} samples of 32 tokens, 999 were .*--samples {total} "):
        built.windows(32, 999)
    with pytest.raises(InputError, match="give --samples 1 "):
        built.windows(32, 0)
    with pytest.raises(InputError, match=f"--sequence-length {built.tokens} or less"):
        built.windows(built.tokens + 1)


def test_a_row_needs_its_last_label(built):
    built.check_rows(built.tokens - 1, 1)
    with pytest.raises(InputError, match=f"--sequence-length {built.tokens - 1} or less"):
        built.check_rows(built.tokens, 1)


def test_what_is_not_there_or_does_not_fit_is_refused(built, tmp_path):
    with pytest.raises(InputError, match="not a Megatron prefix"):
        Tokens(tmp_path / "nothing")
    with built.prefix.with_name("v1.0.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(InputError, match="do not belong together"):
        Tokens(built.prefix)


def test_a_tokenizer_without_eos_is_refused(jsonl, byte_level, tmp_path):
    import copy

    tokenizer = copy.deepcopy(byte_level)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="end-of-sequence"):
        build(jsonl, tokenizer, tmp_path / "x")


def test_a_token_beyond_the_embedding_is_refused(jsonl, byte_level, built, tmp_path):
    """Text that is tokenised, and indexed files of this tokenizer or a stranger's: in every place of the stream."""
    largest = int(built.stream(0, built.tokens).max())
    assert build(jsonl, byte_level, tmp_path / "a", vocab_size=largest + 1).tokens == built.tokens
    message = (
        rf"makes the token {largest} \('.*'\) from '.*corpus.jsonl', and the model has rows for 0 to {largest - 1}"
    )
    with pytest.raises(InputError, match=message):
        build(jsonl, byte_level, tmp_path / "b", vocab_size=largest)
    assert not (tmp_path / "b.bin").exists()
    for prefix in (tmp_path / "a", built.prefix):  # made before, by the same command and given as it is
        with pytest.raises(InputError, match=f"holds the token {largest}, at place"):
            build(jsonl if prefix != built.prefix else prefix, byte_level, prefix, vocab_size=largest)
    with pytest.raises(InputError, match="holds the token -1, at place 2"):
        build(write_indexed(tmp_path / "c", [[5, 6, -1, 7]]), byte_level, tmp_path / "unused", vocab_size=400)


def test_ids_with_holes_decide_the_dtype(jsonl, byte_level, texts, tmp_path):
    """The largest id counts, not how many there are."""
    byte_level.save_pretrained(tmp_path / "t")
    file = tmp_path / "t" / "tokenizer.json"
    values = json.loads(file.read_text())
    first = byte_level.tokenize(texts[0])[0]
    values["model"]["vocab"] |= {first: 70_000}
    file.write_text(json.dumps(values))
    made = build(jsonl, tmp_path / "t", tmp_path / "holes", vocab_size=70_001)
    assert made.corpus.dtype == "int32"
    assert made[0][0] == 70_000
