"""The files beside a model's weights, and which of them a student's folder gets.

Only the files named here are copied. All others stay behind: code (`*.py`, which is also never run), other files that
state the teacher's sizes (`params.json`, quantisation and adapter configs), model cards, weights, and unknown files.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from nemo_minitron.artifacts.json_types import HfConfig, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.tokenizer_config import TOKENIZER_CONFIG, copy_config, in_transformers

OTHER_VOCABULARIES = {
    "added_tokens.json": "added tokens, as older loaders read them",
    "vocab.json": "tokens of a slow BPE tokenizer",
    "vocab.txt": "tokens of a slow WordPiece tokenizer",
    "merges.txt": "merges of a slow BPE tokenizer",
    "tokenizer.model*": "a SentencePiece model; Mistral writes a version behind the name",
    "spiece.model": "a SentencePiece model",
    "sentencepiece*.model": "a SentencePiece model",
    "*.tiktoken": "a tiktoken vocabulary",
    "tiktoken.model": "a tiktoken vocabulary",
    "tekken.json": "Mistral's own tokenizer, which vLLM reads",
}
"""Pattern of names -> why a student needs the file. They repeat tokenizer.json, and are wrong once its vocabulary is
cut."""
TOKENIZER = OTHER_VOCABULARIES | {
    "tokenizer.json": "the whole tokenizer",
    TOKENIZER_CONFIG: "its special tokens and its chat template",
    "special_tokens_map.json": "special tokens, as older loaders read them",
    "*.jinja": "the chat template, and others that servers are told to take",
    "chat_template.json": "the chat template of older loaders",
    "additional_chat_templates/*.jinja": "chat templates by name",
}
SETTINGS = {"generation_config.json": "how the model is asked to write"}
TERMS = {
    "licen[cs]e*": "the licence, which must stay with the model",
    "*_license*": "the licence, under a longer name",
    "notice*": "notices that a licence requires to keep",
    "copying*": "the licence of GNU",
    "copyright*": "who wrote it",
    "*use_policy*": "what a licence allows",
}
CODE_KEYS = ("auto_map", "custom_pipelines")
"""Config keys that refer to `.py` files beside it. transformers has a class for every family here and needs no such
code."""
RECORDS = {"minitron_plan.json": "what was cut", "minitron_compensation.json": "what was re-fitted after the cut"}


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The files in `folder` that make up its tokenizer, sorted by name; empty if there is no folder.

    Raises InputError for a symbolic link that leads out of the folder, or nowhere.
    """
    return [file for _, file in side_files(folder, TOKENIZER)]


def side_files(folder: str | Path, *tables: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """(name within the folder, file) for each file that `tables` name, sorted. Raises InputError as `tokenizer_files`
    does."""
    folder, files = Path(folder), dict[str, Path]()
    for file in [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]:
        name = str(file.relative_to(folder))
        patterns = [pattern for table in tables for pattern in table]
        if any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns) and not name.endswith(".py"):
            check_link(file, folder)
            if file.is_file():
                files[name] = file
    yield from sorted(files.items())


def copy_side_files(source: str | Path, target: str | Path, *tables: Mapping[str, str]) -> None:
    """Copies the files that `tables` name from one folder to another; `tokenizer_config.json` loses references to code.

    Raises InputError as `tokenizer_files` does, and if `tokenizer_config.json` is not JSON.
    """
    for name, file in side_files(source, *tables):
        copy_side_file(file, Path(target) / name)


def copy_side_file(file: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    if file.name == TOKENIZER_CONFIG:
        copy_config(file, target)
    else:
        shutil.copyfile(file, target)


def without_code(config: HfConfig) -> JsonObject:
    """A model's config without the keys that refer to code beside it, since a student's folder has no code."""
    kept = {key: value for key, value in config.items() if key not in CODE_KEYS}
    if kept.get("tokenizer_class") is not None and not in_transformers(kept["tokenizer_class"]):
        del kept["tokenizer_class"]
    return kept


def check_link(file: Path, folder: Path) -> None:
    """Raises InputError for a symbolic link that leads nowhere, or out of the folder.

    A link may lead to another place in the folder or, as in the hub's cache, from `snapshots/REVISION` to `blobs`. A
    link to any other place could put a private file into the student."""
    home, real = folder.resolve(), file.resolve()
    allowed = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(place in real.parents for place in allowed):
        raise InputError(
            f"'{file}' is a symbolic link out of its folder, to '{real}'; only links within the folder are followed: "
            "put the file itself there"
        )
    if not real.exists():
        raise InputError(f"'{file}' is a symbolic link to '{real}', where nothing is; put the file there")
