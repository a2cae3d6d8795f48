"""Whether a student can learn a teacher's tokens: both have one vocabulary, or one of them has more rows at its end."""

from __future__ import annotations

from nemo_minitron.errors import InputError
from nemo_minitron.families.tokenizer import open_tokenizer
from nemo_minitron.sources.tensors import ModelSource


def common_vocabulary(student: ModelSource, teacher: ModelSource) -> int | None:
    """The tokens that both vocabularies begin with, if one has more rows than the other; None for equal ones.

    Raises InputError if their tokenizers do not call these tokens the same, or if the student's makes others."""
    ours, theirs = student.architecture.vocab_size, teacher.architecture.vocab_size
    if ours == theirs:
        return None
    common = min(ours, theirs)
    if wrong := _difference(_tokens(student), _tokens(teacher), common):
        raise InputError(
            f"the teacher has {theirs:,} tokens in its vocabulary and the student has {ours:,}, and {wrong}; a student "
            "learns from a teacher of the same vocabulary, or of one that begins or goes on with the student's"
        )
    return common


def remark(student: ModelSource, teacher: ModelSource, common: int) -> str:
    """The sentence that says which tokens are learned."""
    sizes = (model.architecture.vocab_size for model in (student, teacher))
    ours, theirs = (f"{size:,}" for size in sizes)
    return (
        f"the student has {ours} tokens in its vocabulary and the teacher {theirs}; it learns the {common:,} that both "
        "begin with, and the others are masked"
    )


def _tokens(model: ModelSource) -> dict[int, str]:
    tokenizer = open_tokenizer(model.folder)
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    return {index: token for token, index in tokenizer.get_vocab().items()} | added


def _difference(ours: dict[int, str], theirs: dict[int, str], common: int) -> str:
    """What forbids to learn the first `common` tokens, in words; empty if nothing does."""
    if max(ours) >= common:
        return f"the student's tokenizer makes tokens up to {max(ours):,}"
    for index in sorted(ours.keys() & theirs.keys()):
        if ours[index] != theirs[index]:
            return f"token {index:,} is {ours[index]!r} to the student and {theirs[index]!r} to the teacher"
    return ""
