"""Whether two models share a vocabulary: both have one, or one of them has more rows at its end."""

from __future__ import annotations

import dataclasses
import fnmatch
from pathlib import Path

from nemo_minitron.errors import InputError
from nemo_minitron.families.side_files import TOKENIZER
from nemo_minitron.families.tokenizer import open_tokenizer
from nemo_minitron.sources.tensors import ModelSource

Tokens = dict[int, str]  # id -> token


@dataclasses.dataclass(frozen=True)
class Shared:
    """What a student and its teacher share. `tokens`: those that both vocabularies begin with, None if the two have the
    same number of rows. `remark`: what a user should know about it; empty if nothing."""

    tokens: int | None = None
    remark: str = ""


def shared_vocabulary(student: ModelSource, teacher: ModelSource) -> Shared:
    """What the student can learn. Raises InputError if the tokenizers do not call these tokens the same, if the
    student's makes others, or if two vocabularies of different sizes have no tokenizers to compare."""
    ours, theirs = student.architecture.vocab_size, teacher.architecture.vocab_size
    if ours == theirs:
        return Shared(remark=check_one_vocabulary(student.folder, teacher.folder, ours))
    common = min(ours, theirs)
    try:
        wrong = _difference(_tokens(student.folder), _tokens(teacher.folder), "the teacher", common)
    except InputError as error:
        wrong = f"nothing says which tokens are the same: {error}"
    if wrong:
        raise InputError(
            f"the teacher has {theirs:,} tokens in its vocabulary and the student has {ours:,}, and {wrong}; a student "
            "learns from a teacher of the same vocabulary, or of one that begins or goes on with the student's"
        )
    remark = (
        f"the student has {ours:,} tokens in its vocabulary and the teacher {theirs:,}; it learns the {common:,} that "
        "both begin with, and the others are masked"
    )
    return Shared(common, remark)


def check_one_vocabulary(student: Path, other: Path, rows: int, named: str = "the teacher") -> str:
    """Of two vocabularies of `rows` rows each: a remark if it cannot be known that they are one, else an empty string.
    `student` and `other`: the folders of the tokenizers. `named`: what the other model is to the student. Raises
    InputError if the tokenizers differ."""
    if _same_files(student, other):
        return ""
    tokens: list[Tokens] = []
    for folder, name in ((student, "the student"), (other, named)):
        try:
            tokens.append(_tokens(folder))
        except InputError:
            return f"{name} has no tokenizer to open, so nothing says that {named} calls the student's tokens the same"
    ours, theirs = tokens
    if wrong := _difference(ours, theirs, named):
        raise InputError(
            f"the student and {named} both have {rows:,} tokens in their vocabularies, but {wrong}; legal is {named} "
            "with the student's own vocabulary"
        )
    return ""


def _difference(ours: Tokens, theirs: Tokens, named: str, common: int | None = None) -> str:
    """What forbids that the first `common` tokens are taken for the same, in words; empty if nothing does."""
    if common is not None and max(ours) >= common:
        return f"the student's tokenizer makes tokens up to {max(ours):,}"
    for index in sorted(ours):
        if index not in theirs:
            return f"token {index:,} is {ours[index]!r} to the student and none to {named}"
        if ours[index] != theirs[index]:
            return f"token {index:,} is {ours[index]!r} to the student and {theirs[index]!r} to {named}"
    return ""


def _same_files(*folders: Path) -> bool:
    """Whether two tokenizers are the same files, as those of a student and of the model that it was cut from. Links may
    lead anywhere, since nothing is copied."""
    ours, theirs = (
        {
            file.name: file.read_bytes()
            for file in folder.glob("*")
            if file.is_file() and any(fnmatch.fnmatchcase(file.name.lower(), pattern) for pattern in TOKENIZER)
        }
        for folder in folders
    )
    return bool(ours) and ours == theirs


def _tokens(folder: Path) -> Tokens:
    tokenizer = open_tokenizer(folder)
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    return {index: token for token, index in tokenizer.get_vocab().items()} | added
