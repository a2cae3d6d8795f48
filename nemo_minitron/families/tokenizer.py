"""A model's tokenizer as transformers loads it. No code of the model's folder is ever run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.files import read_json, write_json
from nemo_minitron.artifacts.temporary import apart
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.families.side_files import TOKENIZER, copy_side_files, tokenizer_files, without_code
from nemo_minitron.families.tokenizer_config import in_transformers, plain_config, read_config

__all__ = ["check_ids", "copy_tokenizer", "largest_id", "open_tokenizer", "tokenizer_files"]


def open_tokenizer(model: str | Path) -> Any:
    """The transformers tokenizer of a folder, or of a hub id.

    One of a class that transformers does not have is loaded from its tokenizer.json, with the special tokens of its
    tokenizer_config.json. Raises InputError where there is none, or only one that is code of the model's folder.
    """
    from nemo_minitron.families import on_disk

    folder = on_disk(model)
    if folder is None or not folder.is_dir():
        return _loaded(str(model), model)
    _refuse_code(folder)
    if not _needs_copy(folder):
        return _loaded(str(folder), model)
    with apart() as scratch:
        copy_tokenizer(folder, scratch)
        return _loaded(str(scratch), model)


def copy_tokenizer(folder: Path, target: Path) -> None:
    """The tokenizer's files alone, without what names code, and the config, which says of which class it is where
    its own config does not. Raises InputError."""
    copy_side_files(folder, target, TOKENIZER)
    if (folder / "config.json").is_file():
        write_json(target / "config.json", without_code(read_json(folder / "config.json", "the model's config")))


def largest_id(tokenizer: Any) -> int:
    """The largest id of a transformers tokenizer. Its length says nothing of it where ids have holes."""
    return max([*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder])


def check_ids(ids: Any, tokenizer: Any, vocab_size: int | None, source: str) -> None:
    """`ids`: whole numbers that the tokenizer made of `source`, array [length]. Raises InputError for one that a model
    of this vocabulary has no row for; None: no check."""
    largest = int(ids.max(initial=0)) if vocab_size is not None else 0
    if vocab_size is not None and largest >= vocab_size:
        raise InputError(
            f"the tokenizer makes the token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) of '{source}', "
            f"and the model has rows for 0 to {vocab_size - 1}: take the model's own tokenizer, or resize its "
            f"embedding to {largest_id(tokenizer) + 1} rows"
        )


def _loaded(source: str, name: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of a damaged tokenizer.json the tokenizers library raises Exception itself
        raise InputError(f"'{name}' gives no tokenizer: {first_line(error)}") from error


def _refuse_code(folder: Path) -> None:
    name = read_config(folder).get("tokenizer_class")
    if name is not None and not (folder / "tokenizer.json").is_file() and not in_transformers(name):
        raise InputError(
            f"the tokenizer of '{folder}' is of the class '{name}', which transformers does not have, and code of a "
            "model's folder is never run; a tokenizer.json beside it is needed"
        )


def _needs_copy(folder: Path) -> bool:
    """Whether transformers would ask for code, or for a class that it does not have."""
    values = read_config(folder)
    if values != plain_config(values, (folder / "tokenizer.json").is_file()):
        return True
    config = read_json(folder / "config.json", "the model's config") if (folder / "config.json").is_file() else {}
    return isinstance(config, dict) and without_code(config) != config
