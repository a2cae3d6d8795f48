"""Which checkpoints of a training are complete after a kill: what both hosts share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from nemo_minitron.sources.checkpoint_files import read_metadata


def keep_newest(steps: Mapping[int, Path], damage: Callable[[Path], str]) -> tuple[dict[int, Path], list[str]]:
    """Removes all checkpoints but the newest complete one, as `hosts.protocol.Host.keep_whole` says. `steps`: number of
    steps done -> checkpoint; `damage`: says what is wrong with one, "" for a complete one."""
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


def cut_short(weights: Path) -> str:
    """The name of a file of a torch_dist folder that lacks bytes which `.metadata` names; "" if there is none. It
    checks sizes and not numbers. Raises InputError as `read_metadata`."""
    ends: dict[str, int] = {}
    for info in read_metadata(weights).storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        if not (weights / name).is_file() or (weights / name).stat().st_size < end:
            return str(name)
    return ""
