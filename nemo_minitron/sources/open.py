"""A teacher on disk: a Hugging Face folder, a hub id or a NeMo checkpoint, opened as a TensorSource."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.errors import InputError
from nemo_minitron.families import read_config, resolve
from nemo_minitron.sources.tensors import ModelSource


def is_nemo_checkpoint(path: str | Path) -> bool:
    """A folder with `weights/` and `context/`, as NeMo 2 writes them."""
    return (Path(path) / "weights").is_dir() or (Path(path) / "context").is_dir()


def open_source(source: str | Path) -> ModelSource:
    """Raises InputError for what is neither, or is damaged."""
    path = resolve(source)
    if path.is_dir() and is_nemo_checkpoint(path):
        from nemo_minitron.sources.checkpoint import CheckpointSource

        return CheckpointSource(path)
    if path.is_file():
        raise InputError(f"'{path}' is a file; give a Hugging Face folder or a NeMo checkpoint's folder")
    from nemo_minitron.sources.folder import HFSource

    return HFSource(path)


def config_of(model: str | Path) -> dict[str, Any]:
    """The Hugging Face config of a model; a NeMo checkpoint's from its context, read as data, without NeMo.

    Raises InputError for what is no model.
    """
    path = resolve(model)
    if not is_nemo_checkpoint(path):
        return read_config(path)
    from nemo_minitron.sources.context import hf_config

    config = hf_config(path)
    if config["vocab_size"] is None:  # NeMo took it from the tokenizer; the weights have it
        from nemo_minitron.sources.checkpoint import CheckpointSource

        return CheckpointSource(path).config
    return config
