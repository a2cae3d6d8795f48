"""Which files of a model folder are its tokenizer's."""

from __future__ import annotations

from pathlib import Path

PATTERNS = (
    "tokenizer*", "vocab*", "merges*", "spiece.model", "special_tokens_map.json", "added_tokens.json",
    "chat_template*",
)  # fmt: skip


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The files in `folder` that make its tokenizer, by name; none where there is no folder."""
    found = {file for pattern in PATTERNS for file in Path(folder).glob(pattern) if file.is_file()}
    return sorted(found)
