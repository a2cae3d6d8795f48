"""`tokenizer_config.json` without references to code, in a form that every transformers reads."""

from __future__ import annotations

import shutil
from pathlib import Path

from nemo_minitron.artifacts.files import read_json, write_json
from nemo_minitron.artifacts.json_types import JsonFields, JsonObject
from nemo_minitron.errors import InputError

TOKENIZER_CONFIG = "tokenizer_config.json"
FAST = "PreTrainedTokenizerFast"
COMMON = (
    "PreTrainedTokenizer", "LlamaTokenizer", "CodeLlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer",
    "GPTNeoXTokenizer", "T5Tokenizer", "BertTokenizer", "CohereTokenizer",
)  # fmt: skip
"""Classes of transformers 4.51 to 5, also with "Fast" behind the name; listed here to save the import of
transformers."""


def plain_config(values: JsonFields, fast: bool) -> JsonObject:
    """A tokenizer's config without `auto_map`. `fast`: a tokenizer.json lies beside it, so a class that transformers
    lacks (code beside the model, or a class of a newer transformers) is replaced by the plain one.

    transformers 5 writes `extra_special_tokens` as a list, while 4.5x expects names; both read the older key.
    """
    kept = {key: value for key, value in values.items() if key != "auto_map"}
    name = kept.get("tokenizer_class")
    if fast and name is not None and not in_transformers(name):
        kept["tokenizer_class"] = FAST
    extra = kept.get("extra_special_tokens")
    if isinstance(extra, list):
        del kept["extra_special_tokens"]
        kept["additional_special_tokens"] = [*(kept.get("additional_special_tokens") or []), *extra]
    return kept


def in_transformers(name: object) -> bool:
    """Whether the installed transformers has a tokenizer of this name."""
    if not isinstance(name, str):
        return False
    if name.removesuffix("Fast") in COMMON:
        return True
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return tokenizer_class_from_name(name) is not None


def read_config(folder: Path) -> JsonObject:
    """The `tokenizer_config.json` of a folder; {} if there is none. Raises InputError if it is not a JSON object."""
    file = folder / TOKENIZER_CONFIG
    values = read_json(file, "the tokenizer's config") if file.is_file() else {}
    if not isinstance(values, dict):
        raise InputError(f"'{file}' is not a tokenizer's config: it holds a {type(values).__name__}")
    return values


def copy_config(file: Path, target: Path) -> None:
    """Copies a `tokenizer_config.json`, also onto itself; byte by byte if it is plain already.

    Raises InputError as `read_config` does.
    """
    values = read_config(file.parent)
    plain = plain_config(values, (file.parent / "tokenizer.json").is_file())
    if plain != values:
        write_json(target, plain)
    elif file != target:
        shutil.copyfile(file, target)
