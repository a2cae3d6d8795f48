"""Bytes a token, and a tokenizer's identity."""

from __future__ import annotations

import pytest

from nemo_minitron.data import load_tokenizer, token_bytes, tokenizer_digest
from nemo_minitron.errors import InputError


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_byte_level_tokens_add_up_to_the_text(byte_level, texts):
    lengths = token_bytes(byte_level)
    assert lengths.dtype == "int64"
    assert lengths.shape == (400,)
    for text in texts[:3]:
        assert lengths[ids_of(byte_level, text)].sum() == len(text.encode())
    controls = len("<|role|>") + len("<|end|>")  # in the text, but special tokens stand for no bytes
    assert lengths[ids_of(byte_level, texts[3])].sum() == len(texts[3].encode()) - controls


def test_sentencepiece_tokens_add_up_to_the_text(sentencepiece):
    lengths = token_bytes(sentencepiece)
    text = "the cat of the 東京 🙂\n  é"
    ids = ids_of(sentencepiece, text)
    assert sentencepiece.convert_tokens_to_ids("▁the") in ids
    assert sentencepiece.convert_tokens_to_ids("<0xF0>") in ids
    assert lengths[ids].sum() == len(text.encode())
    assert lengths[sentencepiece.convert_tokens_to_ids("京")] == 3


def test_added_tokens_count_as_written_and_special_ones_as_nothing(byte_level):
    import copy

    tokenizer = copy.deepcopy(byte_level)
    tokenizer.add_tokens(["naïve→"])
    lengths = token_bytes(tokenizer)
    assert lengths[tokenizer.convert_tokens_to_ids("naïve→")] == len("naïve→".encode())
    assert not lengths[[0, 1, 2]].any()


def test_a_larger_vocabulary_of_the_model_is_filled_with_nothing(byte_level):
    assert token_bytes(byte_level, 512).shape == (512,)
    assert not token_bytes(byte_level, 512)[400:].any()
    with pytest.raises(InputError, match="at least the tokenizer's 400"):
        token_bytes(byte_level, 399)


def test_wordpiece_is_refused():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    raw.decoder = decoders.WordPiece()
    with pytest.raises(InputError, match="WordPiece"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]"))


def test_the_digest_follows_the_tokens_and_nothing_else(byte_level, sentencepiece):
    import copy

    digest = tokenizer_digest(byte_level)
    byte_level("a b c", truncation=True, max_length=2)  # leaves its mark in the tokenizer
    assert tokenizer_digest(byte_level) == digest
    assert tokenizer_digest(sentencepiece) != digest
    other = copy.deepcopy(byte_level)
    other.eos_token = "<|role|>"
    assert tokenizer_digest(other) != digest


def test_what_is_no_fast_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="gives no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="a fast Hugging Face tokenizer"):
        load_tokenizer(object())


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_truncated_file_is_one_sentence(byte_level, tmp_path, name):
    """Of a truncated tokenizer.json the tokenizers library raises `Exception` itself."""
    byte_level.save_pretrained(tmp_path)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=r"gives no tokenizer: .|tokenizer_config.json' is not valid JSON") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_bytes_of_ids_with_holes(byte_level, tmp_path):
    import json

    byte_level.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["vocab"] |= {"e": 500}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    lengths = token_bytes(load_tokenizer(tmp_path))
    assert (lengths.shape, lengths[500], lengths[450]) == ((501,), 1, 0)
