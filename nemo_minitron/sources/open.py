"""Opens a model on disk as a TensorSource: a Hugging Face folder, a hub id, a checkpoint of NeMo or Megatron-Bridge."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families import read_config, resolve
from nemo_minitron.sources import bridge_config
from nemo_minitron.sources.bridge_config import is_bridge_checkpoint, newest
from nemo_minitron.sources.tensors import ModelSource


def is_checkpoint(path: str | Path) -> bool:
    """Whether a folder is a checkpoint: NeMo 2 writes `weights/` and `context/`, Megatron-Bridge `run_config.yaml`."""
    nemo = (Path(path) / "weights").is_dir() or (Path(path) / "context").is_dir()
    return nemo or is_bridge_checkpoint(path)


def open_source(source: str | Path) -> ModelSource:
    """The model as a ModelSource. Raises InputError if `source` is neither kind of model, or is damaged."""
    path = resolve(source)
    if path.is_dir() and is_checkpoint(path):
        from nemo_minitron.sources.checkpoint import CheckpointSource

        return CheckpointSource(path)
    if path.is_file():
        raise InputError(f"'{path}' is a file; give a Hugging Face folder or a checkpoint's folder")
    from nemo_minitron.sources.folder import HFSource

    return HFSource(path)


def tokenizer_folder_of(model: str | Path) -> Path:
    """The folder where a model's tokenizer lies, if it has one. Raises InputError if there is no model."""
    path = resolve(model)
    if not is_checkpoint(path):
        return path
    if is_bridge_checkpoint(path):
        return newest(path) / "tokenizer"
    from nemo_minitron.sources.context import tokenizer_folder

    return tokenizer_folder(path)


def config_of(model: str | Path) -> JsonObject:
    """The Hugging Face config of a model; for a checkpoint it is made from the checkpoint's own, without its framework.

    Raises InputError if `model` is no model.
    """
    path = resolve(model)
    if not is_checkpoint(path):
        return read_config(path)
    if is_bridge_checkpoint(path):
        return bridge_config.hf_config(newest(path))
    from nemo_minitron.sources.context import hf_config

    config = hf_config(path)
    if config["vocab_size"] is None:  # NeMo took it from the tokenizer; the weights show it
        from nemo_minitron.sources.checkpoint import CheckpointSource

        return CheckpointSource(path).config
    return config
