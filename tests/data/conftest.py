"""Small tokenizers and corpora, made here: no network, no demo model."""

from __future__ import annotations

import json

import pytest

TEXTS = [
    "The quick brown fox jumps over 13 lazy dogs, twice in 1987.\n\nThen it sleeps.",
    "Naïve cafés — 東京 🙂 cost £3.50; 二つ for €6,00.\n\tIndented, \u00a0and   spaced ",
    " A leading blank, and <0x41> written out. " * 3,
    "<|role|>user\nWhat is it?<|end|>" + "word " * 40,
]


@pytest.fixture(scope="session")
def byte_level():
    """A byte-level BPE of 400 tokens with a BOS template, as Llama 3 has: it must not reach the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|end|>", "<|role|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXTS * 5,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    raw.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture(scope="session")
def sentencepiece():
    """As Gemma's: ▁ for blanks, no blank put in front, bytes where the vocabulary has no character."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *"abcdefghijklmnopqrstuvwxyz", "th", "the", "▁the", "京"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    raw = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e"), ("▁", "the")], byte_fallback=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def jsonl(tmp_path):
    """TEXTS as JSONL, two blank documents and one blank line among them."""
    path = tmp_path / "corpus.jsonl"
    records = [{"title": str(i), "text": text} for i, text in enumerate([TEXTS[0], "", *TEXTS[1:], " \n"])]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def texts():
    return TEXTS
