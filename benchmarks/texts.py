"""Held-out texts of three kinds: the demo's Wikipedia, a novel, and Python's reference manual.

The novel is Jane Austen's "Persuasion" (public domain) from Debian's package r-cran-janeaustenr (`apt-get download
r-cran-janeaustenr`); nothing of the package is installed or run. The manual is `pydoc_data.topics`, which every Python
has.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import zlib
from pathlib import Path

import common

TRAIN, TEST = common.TEXT / "train.jsonl", common.TEXT / "test.jsonl"
TEXTS = ("wikipedia", "fiction", "manual")
TITLE, DATABASE = "Persuasion", "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
LINE = b"\x00\x04\x00\x09"  # R's mark of a string of ASCII in its serialized form; its length and its bytes follow


def write_texts(folder: Path, package: Path | None) -> dict[str, Path]:
    """The file of each text, as JSONL; `package`: the .deb of the novels. Files that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"wikipedia": TEST, **{name: folder / f"{name}.jsonl" for name in TEXTS[1:]}}
    if not files["manual"].exists():
        from pydoc_data.topics import topics

        _write(files["manual"], [topics[name] for name in sorted(topics)])
    if not files["fiction"].exists():
        if package is None:
            raise SystemExit("give --novels FILE.deb, of `apt-get download r-cran-janeaustenr`")
        _write(files["fiction"], [novel(package)])
    return files


def _write(file: Path, documents: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def novel(package: Path) -> str:
    """The novel's text: paragraphs on a line each, with an empty line between them."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        data = (Path(folder) / DATABASE).read_bytes()
    while data:  # each book: 4 bytes that tell its size, then a zlib stream
        stream = zlib.decompressobj()
        lines, data = _strings(stream.decompress(data[4:])), stream.unused_data
        if lines[0] == TITLE:
            paragraphs = "\n".join(lines).split("\n\n")
            return "\n\n".join(" ".join(text.split()) for text in paragraphs if text.strip())
    raise SystemExit(f"{package} has no '{TITLE}'")


def _strings(data: bytes) -> list[str]:
    found, at = [], data.find(LINE)
    while at >= 0:
        start, end = at + 8, at + 8 + int.from_bytes(data[at + 4 : at + 8], "big")
        found.append(data[start:end].decode("ascii"))
        at = data.find(LINE, end)
    return found
