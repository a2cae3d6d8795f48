"""A training resumes on the host that began it: no host reads the checkpoints of another's optimizer and data."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.artifacts.files import read_json, write_json
from nemo_minitron.artifacts.parse import text
from nemo_minitron.artifacts.run_folder import TrainingFolder
from nemo_minitron.errors import InputError
from nemo_minitron.hosts import host_name

FIRST = "nemo"  # the only host that trained before folders named theirs


def begin_on_this_host(training: Path) -> None:
    """Notes the host in the folder of a training. Raises InputError if the training there was begun on another host,
    before anything in the folder is changed."""
    files, here = TrainingFolder(training), host_name()
    begun = files.settings.exists()
    there = read_json(files.host, "the name of the training's host", text()) if files.host.exists() else FIRST
    if begun and there != here:
        raise InputError(
            f"the training in '{training}' was begun on the host '{there}', and '{here}' cannot resume from its "
            f"checkpoints; give --host {there}, or remove that folder to train anew"
        )
    training.mkdir(parents=True, exist_ok=True)
    write_json(files.host, here)
