"""Text in, tokens out: sources of text, tokenizers, and Megatron's indexed files.

Importing this loads none of torch, Megatron, NeMo and transformers; each is loaded where it is first used.
"""

from nemo_minitron.data.checks import check_source, check_texts
from nemo_minitron.data.indexed import Tokens, build, held_out, prefix_of
from nemo_minitron.data.text import documents
from nemo_minitron.data.vocabulary import load_tokenizer, token_bytes, tokenizer_digest

__all__ = [
    "Tokens",
    "build",
    "check_source",
    "check_texts",
    "documents",
    "held_out",
    "load_tokenizer",
    "prefix_of",
    "token_bytes",
    "tokenizer_digest",
]
