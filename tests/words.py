"""A small tokenizer for pico models, trained on the test's own texts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

VOCAB = 61  # of the model of tests/evaluation
WORDS = ["<unk>", *(f"w{index}" for index in range(VOCAB - 1))]


def save_tokenizer(folder: str | Path, texts: Iterable[str], size: int = 400) -> None:
    """Writes a byte-level BPE of exactly `size` tokens, with the ids that pico configs name: bos 1, eos 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    raw.add_tokens([f"<extra_{i}>" for i in range(size - raw.get_vocab_size())])  # short texts merge too little
    PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
