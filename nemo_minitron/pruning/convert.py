"""A checkpoint, or the text of a model that reads pictures, as a Hugging Face folder: a cut that keeps everything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.files import atomic_folder, write_json
from nemo_minitron.artifacts.temporary import apart
from nemo_minitron.families import resolve, written_config
from nemo_minitron.families.side_files import SETTINGS, TERMS, TOKENIZER, copy_side_files
from nemo_minitron.progress import Progress
from nemo_minitron.pruning.write import write_weights
from nemo_minitron.sources.open import is_checkpoint
from nemo_minitron.sources.tensors import ModelSource
from nemo_minitron.sources.text_of import TextSource

if TYPE_CHECKING:
    from nemo_minitron.architecture import Architecture

TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # by safetensors' names


@contextlib.contextmanager
def as_folder(model: str | Path) -> Iterator[Path]:
    """A context with a Hugging Face folder of `model`: the folder itself, or a converted checkpoint.

    A converted one is deleted when the context ends.
    """
    path = resolve(model)
    if not is_checkpoint(path):
        yield path
        return
    with apart() as scratch:
        yield convert(path, scratch / path.name)


def convert(model: Path, out: Path) -> Path:
    """A checkpoint of a host, or a folder of a model that reads pictures -> a Hugging Face folder of its text, with its
    tokenizer. Weights keep their dtype.

    Raises InputError for a damaged checkpoint, for one without its tokenizer, and if the disk is too small.
    """
    from nemo_minitron.data import load_tokenizer

    source = _source(model)
    tokenizer = load_tokenizer(source.folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    # a model of pictures says its own, a chat model two of them
    known = {key: source.config[key] for key in ends if source.config.get(key) is not None}
    dtype = TORCH_NAMES[source.dtype(next(iter(source.architecture.shapes())))]
    with atomic_folder(out) as folder, Progress("convert: MB", "MB") as progress:
        write_weights(source, identity(source.architecture), folder, source.config, progress=progress)
        write_json(folder / "config.json", written_config(source.config | ends | known | {"torch_dtype": dtype}))
        copy_side_files(source.folder, folder, TOKENIZER, *(() if is_checkpoint(model) else (SETTINGS, TERMS)))
    return out


def _source(model: Path) -> ModelSource:
    if is_checkpoint(model):
        from nemo_minitron.sources.checkpoint import CheckpointSource

        return CheckpointSource(model)
    return TextSource(model)


def identity(architecture: Architecture) -> PrunePlan:
    """The plan that cuts nothing."""
    return PrunePlan(source=architecture, target=architecture, keep={})
