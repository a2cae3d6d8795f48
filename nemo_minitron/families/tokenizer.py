"""A model's tokenizer, loaded by transformers. No code from the model's folder is ever run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts.files import read_json, write_json
from nemo_minitron.artifacts.temporary import apart
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.families.side_files import TOKENIZER, copy_side_files, tokenizer_files, without_code
from nemo_minitron.families.tokenizer_config import in_transformers, plain_config, read_config

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_ids", "copy_tokenizer", "largest_id", "open_tokenizer", "tokenizer_files"]


def open_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The transformers tokenizer of a folder, or of a hub id.

    If transformers lacks the tokenizer's class, it is loaded from tokenizer.json with the special tokens of
    tokenizer_config.json. Raises InputError if there is no tokenizer, or only one that needs code from the folder.
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
    """Copies only the tokenizer's files, without references to code, and config.json, which names the tokenizer's class
    if tokenizer_config.json does not. Raises InputError as `copy_side_files` does."""
    copy_side_files(folder, target, TOKENIZER)
    if (folder / "config.json").is_file():
        write_json(target / "config.json", without_code(read_json(folder / "config.json", "the model's config")))


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id of a transformers tokenizer. Its length does not tell the largest id if there are unused ids."""
    return max([*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder])


def check_ids(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None, source: str) -> None:
    """Raises InputError if a model with `vocab_size` rows (None: no check) has no row for one of the ids.

    `ids`: array [length] of whole numbers, which the tokenizer made from `source`."""
    largest = int(ids.max(initial=0)) if vocab_size is not None else 0
    if vocab_size is not None and largest >= vocab_size:
        raise InputError(
            f"the tokenizer makes the token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) from '{source}', "
            f"and the model has rows for 0 to {vocab_size - 1}: use the model's own tokenizer, or resize its "
            f"embedding to {largest_id(tokenizer) + 1} rows"
        )


def _loaded(source: str, name: str | Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged tokenizer.json
        raise InputError(f"'{name}' gives no tokenizer: {first_line(error)}") from error


def _refuse_code(folder: Path) -> None:
    name = read_config(folder).get("tokenizer_class")
    if name is not None and not (folder / "tokenizer.json").is_file() and not in_transformers(name):
        raise InputError(
            f"the tokenizer of '{folder}' has the class '{name}', which transformers lacks, and code of a "
            "model's folder is never run; a tokenizer.json beside it is needed"
        )


def _needs_copy(folder: Path) -> bool:
    """Whether transformers would need code from the folder, or a class that it lacks."""
    values = read_config(folder)
    if values != plain_config(values, (folder / "tokenizer.json").is_file()):
        return True
    config = read_json(folder / "config.json", "the model's config") if (folder / "config.json").is_file() else {}
    return isinstance(config, dict) and without_code(config) != config
