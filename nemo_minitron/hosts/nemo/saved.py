"""The checkpoints that a training has saved: which of them are whole, after a kill while one was saved or removed."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

from nemo_minitron.errors import InputError
from nemo_minitron.sources.checkpoint import read_metadata

_LAST = re.compile(r"step=(\d+)-last")
UNFINISHED = "-unfinished"  # NeMo's mark beside a checkpoint that it is saving, or removing; it refuses to resume then


def keep_whole(folder: Path) -> tuple[dict[int, Path], list[str]]:
    """Steps done -> the newest whole checkpoint of `folder`, the only one that stays: NeMo would go on from the one
    that was changed last, which may be one that a kill left half-removed. And a line for each that was damaged."""
    for marker in folder.glob(f"*{UNFINISHED}"):
        shutil.rmtree(folder / marker.name.removesuffix(UNFINISHED), ignore_errors=True)
        marker.unlink()
    steps = {int(found[1]) + 1: path for path in folder.iterdir() if (found := _LAST.fullmatch(path.name))}
    kept: dict[int, Path] = {}
    lines = []
    for step in sorted(steps, reverse=True):  # NeMo counts steps from 0
        if not kept and not (why := damage(steps[step])):
            kept[step] = steps[step]
            continue
        if not kept:
            lines.append(f"the checkpoint {steps[step]} is not whole ({why}); it goes, and an older one is taken")
        shutil.rmtree(steps[step], ignore_errors=True)
    return kept, lines


def damage(checkpoint: Path) -> str:
    """What a NeMo checkpoint lacks, in words; empty for a whole one. Looks at sizes, not at numbers."""
    weights = checkpoint / "weights"
    try:
        ends: dict[str, int] = {}
        for info in read_metadata(weights).storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            if not (weights / name).is_file() or (weights / name).stat().st_size < end:
                return f"weights/{name} is gone or cut short"
        for record in (weights / "metadata.json", checkpoint / "context" / "io.json"):
            json.loads(record.read_text())
        return "" if zipfile.is_zipfile(weights / "common.pt") else "weights/common.pt is gone or cut short"
    except (InputError, OSError, ValueError, AttributeError, TypeError) as error:
        return str(error)
