"""Long documents in pieces: the tokens are those of the whole, whatever the tokenizer and wherever it is cut.

Mutations tried by hand, each of which makes tests here fail: a piece that begins without the x before it; tokens of x
that are not dropped; marks that Unigram does not end words before; added tokens that bar nothing.
"""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from nemo_minitron.data import Tokens, build
from nemo_minitron.data.lines import Document
from nemo_minitron.data.pieces import MARKS, Pieces, alternatives, batches, encoded, marks_of
from nemo_minitron.data.vocabulary import parts_of

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = f"{CONTRACTIONS}|{WORDS}"
ALPHABET = [
    *"abst.,' -_/!?)(", "th", "e", "the", " ", "  ", "\n", "\n\n", "\r\n", "\t", "'s", "1", "23", "é", "e\u0301", "京",
    "は", "。",
    "，", "🙂", "\u00a0", "\u3000", "\u1100", "\u1161", "한", "²", "ﬁ", "<x>", "<|e|>", "ab c", "Ж", "\u01c4",
    "\u2581",
]  # fmt: skip


def text(generator, length):
    return "".join(generator.choice(ALPHABET) for _ in range(length))


def splitter(kind):
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel
    return {
        "GPT-2": lambda: byte_level(add_prefix_space=False),
        "GPT-2 with a blank in front": lambda: byte_level(add_prefix_space=True),
        "SmolLM2": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)]
        ),
        "Llama 3": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), byte_level(add_prefix_space=False, use_regex=False)]
        ),
    }[kind]()


def byte_level(kind, corpus):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    if kind == "Llama 3":
        made.normalizer = normalizers.NFC()  # as Qwen's
    made.pre_tokenizer = splitter(kind)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def without_splitter(kind, corpus):
    """BPE over whole texts, as Llama 2 and Mistral have it: what was trained on words, without the splitter."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581*[^\u2581]*"), "isolated")
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, limit_alphabet=40, show_progress=False)
    made.train_from_iterator(corpus, trainer)
    values = json.loads(made.to_str())
    values["added_tokens"] = values["added_tokens"][:1]
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prefix = {"type": "Prepend", "prepend": "\u2581"}
    first = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    old = kind == "Llama 2"
    values["normalizer"] = {"type": "Sequence", "normalizers": [prefix, blanks]} if old else None
    values["pre_tokenizer"] = None if old else first
    return Tokenizer.from_str(json.dumps(values))


def unigram(corpus):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace(prepend_scheme="always")
    made.train_from_iterator(
        corpus,
        trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
    )
    return made


def tokenizer(kind, generator):
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    corpus = [text(generator, 400) for _ in range(20)]
    if kind == "Unigram":
        made = unigram(corpus)
    else:
        made = without_splitter(kind, corpus) if kind in ("Llama 2", "Mistral") else byte_level(kind, corpus)
    made.add_special_tokens(["<|e|>"])
    flags = {name: generator.random() < 0.5 for name in ("lstrip", "rstrip", "normalized")}
    made.add_tokens([AddedToken("<x>", **flags), AddedToken("ab", rstrip=True), AddedToken("s ", single_word=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|e|>")


KINDS = ["GPT-2", "GPT-2 with a blank in front", "SmolLM2", "Llama 3", "Llama 2", "Mistral", "Unigram"]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_tokens_of_the_whole(kind):
    generator = random.Random(kind)
    made = tokenizer(kind, generator)
    pieces, cuts = Pieces(made, parts_of(made), size=6), 0
    for _ in range(80):
        whole = text(generator, generator.randint(1, 120))
        parts = list(pieces.of(Document(whole.encode(), "")))
        assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
        cuts += len(parts) - 1
        found = np.concatenate([encoded(made, [part])[0] for part in parts])
        np.testing.assert_array_equal(found, made(whole, add_special_tokens=False)["input_ids"], err_msg=repr(whole))
    assert cuts > 30


def test_unknown_tokenizers_get_a_document_whole(byte_level, sentencepiece):
    parts = parts_of(byte_level)
    assert marks_of(parts) == (MARKS, None)
    split = {"type": "Split", "pattern": {"Regex": r"\w+|[^\w]+$"}, "behavior": "Isolated", "invert": False}
    unknown = [
        parts | {"pre_tokenizer": split}, parts | {"normalizer": {"type": "Lowercase"}},
        parts | {"model": parts["model"] | {"dropout": 0.1}},
        parts | {"pre_tokenizer": None, "model": {"type": "Unigram", "vocab": []}},
        parts | {"pre_tokenizer": split | {"pattern": {"String": " "}}},
    ]  # fmt: skip
    for values in unknown:
        assert marks_of(values)[0] == ""
        whole = Document(b"some words. " * 10, "")
        assert [piece.last for piece in Pieces(byte_level, values, size=6).of(whole)] == [True]
    crossing = parts_of(sentencepiece)
    crossing["model"]["vocab"]["a\u2581b"] = 999
    assert " " not in marks_of(crossing)[0]


def test_alternatives():
    assert alternatives(r"a|[|)]b|(?:c|d)|\|") == {"a", "[|)]b", "(?:c|d)", r"\|"}
    assert r"\s+(?!\S)" in alternatives(LLAMA3)


def test_a_batch_is_bounded(byte_level):
    """So is memory: what a tokenizer knows of each token takes a hundred times the text."""
    pieces = Pieces(byte_level, parts_of(byte_level), size=100)
    sizes = [sum(len(p.text) for p in batch) for batch in batches([Document(b"a word. " * 2000, "")], pieces, 1000)]
    assert len(sizes) == 16
    assert max(sizes) < 1300


def test_a_long_document_in_the_files(byte_level, tmp_path, monkeypatch):
    """One document, whatever its pieces: lengths, EOS, digest and bytes as of the whole."""
    generator = random.Random(1)
    long = "".join(f"the word {generator.random()} and, then {i}.\n" for i in range(60_000))
    assert len(long) > 2 << 20  # a long line, and several batches
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("first", long, "last")))
    made = build(tmp_path / "a.jsonl", byte_level, tmp_path / "a")
    assert isinstance(made, Tokens)
    assert len(made) == 3
    np.testing.assert_array_equal(made[1][:-1], byte_level(long, add_special_tokens=False)["input_ids"])
    assert [int(made[i][-1]) for i in range(3)] == [byte_level.eos_token_id] * 3
    assert made.corpus.bytes == len(long) + len("firstlast")
