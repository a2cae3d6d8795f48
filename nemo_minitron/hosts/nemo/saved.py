"""The checkpoints of a training: which of them are complete after a kill while one was saved or removed."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

from nemo_minitron.errors import InputError
from nemo_minitron.sources.checkpoint import read_metadata

_LAST = re.compile(r"step=(\d+)-last")
UNFINISHED = "-unfinished"  # NeMo's mark beside a checkpoint that it saves or removes; NeMo does not resume with it


def keep_whole(folder: Path) -> tuple[dict[int, Path], list[str]]:
    """Removes all checkpoints but the newest complete one, as `hosts.protocol.Host.keep_whole` says.

    NeMo resumes from the checkpoint that was changed last. After a kill that may be one that was half-removed.
    """
    for marker in folder.glob(f"*{UNFINISHED}"):
        shutil.rmtree(folder / marker.name.removesuffix(UNFINISHED), ignore_errors=True)
        marker.unlink()
    # NeMo counts steps from 0: the checkpoint `step=9-last` has done ten.
    steps = {int(match[1]) + 1: path for path in folder.iterdir() if (match := _LAST.fullmatch(path.name))}
    kept: dict[int, Path] = {}
    lines = []
    for step in sorted(steps, reverse=True):
        if not kept and not (why := damage(steps[step])):
            kept[step] = steps[step]
            continue
        if not kept:
            lines.append(f"the checkpoint {steps[step]} is damaged ({why}); it is removed, and an older one is taken")
        shutil.rmtree(steps[step], ignore_errors=True)
    return kept, lines


def damage(checkpoint: Path) -> str:
    """What is wrong with a NeMo checkpoint, in words; empty if it is complete. It checks sizes and not numbers."""
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
