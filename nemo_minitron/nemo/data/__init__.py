"""Text in, tokens out: sources of text, Megatron's indexed files, and NeMo's data module over them.

Importing this loads none of torch, Megatron, NeMo and transformers; each is loaded where it is first used.
"""

from nemo_minitron.nemo.data.indexed import Tokens, build, held_out, prefix_of
from nemo_minitron.nemo.data.module import data_module, nemo_tokenizer
from nemo_minitron.nemo.data.text import documents
from nemo_minitron.nemo.data.vocabulary import load_tokenizer, token_bytes, tokenizer_digest

__all__ = [
    "Tokens",
    "build",
    "data_module",
    "documents",
    "held_out",
    "load_tokenizer",
    "nemo_tokenizer",
    "prefix_of",
    "token_bytes",
    "tokenizer_digest",
]
