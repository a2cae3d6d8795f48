"""A checkpoint as a Hugging Face folder: a cut that keeps everything, into the other format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.files import atomic_folder, write_json
from nemo_minitron.artifacts.temporary import apart
from nemo_minitron.families import resolve, written_config
from nemo_minitron.families.side_files import TOKENIZER, copy_side_files
from nemo_minitron.progress import of_bytes
from nemo_minitron.pruning.write import write_weights
from nemo_minitron.sources.open import is_checkpoint

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


def convert(checkpoint: Path, out: Path) -> Path:
    """A checkpoint of a host -> a Hugging Face folder with its tokenizer. Weights keep their dtype.

    Raises InputError for a damaged checkpoint, for one without its tokenizer, and if the disk is too small.
    """
    from nemo_minitron.data import load_tokenizer
    from nemo_minitron.sources.checkpoint import CheckpointSource

    source = CheckpointSource(checkpoint)
    tokenizer = load_tokenizer(source.folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    dtype = TORCH_NAMES[source.dtype(next(iter(source.architecture.shapes())))]
    with atomic_folder(out) as folder:
        write_weights(source, identity(source.architecture), folder, source.config, progress=of_bytes("convert: MB"))
        write_json(folder / "config.json", written_config(source.config | ends | {"torch_dtype": dtype}))
        copy_side_files(source.folder, folder, TOKENIZER)
    return out


def identity(architecture: Architecture) -> PrunePlan:
    """The plan that cuts nothing."""
    return PrunePlan(source=architecture, target=architecture, keep={})
