"""A model and a corpus -> the same model in rotated coordinates of its residual stream, before a cut of hidden
channels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nemo_minitron.artifacts.files import atomic_folder, write_json
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.commands.corpus import begin, say, tokenise
from nemo_minitron.commands.passes import fit_pass
from nemo_minitron.commands.place import check_writable, working
from nemo_minitron.errors import InputError
from nemo_minitron.families import check_stage, resolve, to_hf, written_config
from nemo_minitron.families.side_files import SETTINGS, TERMS, TOKENIZER, copy_side_files
from nemo_minitron.hosts import check_model, host_of
from nemo_minitron.launch.torchrun import launch
from nemo_minitron.progress import Progress
from nemo_minitron.pruning.convert import identity
from nemo_minitron.pruning.rotation import Rotated, Rotation, check_rotation, rotation_of
from nemo_minitron.pruning.write import write_weights
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.orders import RotateOrder
from nemo_minitron.sources.open import is_checkpoint, open_source
from nemo_minitron.sources.tensors import ModelSource

RECORD = "minitron_rotation.json"


def run_rotate(
    model: str, data: str, out: Path, calibration: Calibration, layout: Layout, *, skip_bad_lines: bool = False
) -> Rotation:
    """`minitron rotate`: leaves the new folder `out`. `calibration` says which rows are read.

    Raises InputError for what cannot run, before a model is loaded, and RuntimeError if a process fails.
    """
    path = resolve(model)
    if is_checkpoint(path):
        raise InputError(
            f"'{model}' is a checkpoint; rotate reads Hugging Face folders: run minitron convert {model} FOLDER first"
        )
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"'{out}' already exists; give a new folder with --out")
    check_writable(out)
    source = open_source(path)
    check_model(source.config, "rotate")
    check_rotation(check_stage(source.config, "rotate"))
    fit = fit_pass(source, calibration, layout, calibration.batch_size)
    begin(f"rotating {model} by {data}")
    with working(out) as work:
        tokens = tokenise(data, source.folder, work / "calibration", source.architecture.vocab_size, skip_bad_lines)
        fit.text(tokens)
        say(fit.remark)
        return rotate(source, tokens.prefix, out, work / "covariance.npy", fit.settings, layout)


def rotate(
    source: ModelSource, data: Path, out: Path, covariance: Path, calibration: Calibration, layout: Layout,
    log: Path | None = None,
) -> Rotation:  # fmt: skip
    """Sums up the stream in the processes of the layout and writes the rotated model to the folder `out`. `data`: a
    .bin/.idx prefix; the sizes of `calibration` fit it. `covariance`: the file between the two steps.

    Raises InputError as `rotation_of`, and RuntimeError if a process fails.
    """
    launch(RotateOrder(source.path, data, covariance, calibration, layout), host_of().worker, log)
    rotation = rotation_of(source, np.load(covariance))
    rows = {name: getattr(calibration, name) for name in ("samples", "sequence_length", "seed", "precision")}
    write_rotated(source, rotation, out, {"model": source.digest, **rows})
    return rotation


def write_rotated(source: ModelSource, rotation: Rotation, out: Path, notes: Mapping[str, object]) -> None:
    """Writes the rotated model, with its tokenizer, as a Hugging Face folder that appears complete or not at all."""
    rotated, whole = Rotated(source, rotation), identity(source.architecture)
    config = to_hf(source.architecture, source.config)
    record: JsonObject = {
        **notes, "mixed_channels": rotation.mixed, "energy": [round(share, 9) for share in rotation.energy.tolist()]
    }  # fmt: skip
    with atomic_folder(out.resolve()) as folder, Progress("rotate: MB", "MB") as progress:
        write_weights(rotated, whole, folder, config, threads=2, progress=progress)
        copy_side_files(source.folder, folder, TOKENIZER, SETTINGS, TERMS)
        write_json(folder / "config.json", written_config(config))
        write_json(folder / RECORD, record)


def describe(rotation: Rotation) -> str:
    """What was rotated, and how much of the stream lies in few channels."""
    channels = len(rotation.energy)
    parts = ", ".join(f"{100 * rotation.kept(n):.1f} % in {n}" for n in _sizes(channels))
    own = channels - rotation.mixed
    alone = f"; {own} channels keep their own axes, because the output head is the embedding" if own else ""
    return f"the stream's energy: {parts} of {channels} channels{alone}"


def _sizes(channels: int) -> list[int]:
    """Half of the channels, three quarters, seven eighths."""
    return [channels // 2, 3 * channels // 4, 7 * channels // 8]
