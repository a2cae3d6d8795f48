"""`minitron convert`: a checkpoint -> a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of NeMo 2 or of Megatron-Bridge.")],
    out: Annotated[Path, typer.Argument(help="New folder for the model.")],
) -> None:
    """Copy a checkpoint to a Hugging Face folder, which every host reads. It needs neither NeMo nor Megatron-Bridge."""
    from nemo_minitron.commands.place import check_writable
    from nemo_minitron.errors import InputError
    from nemo_minitron.pruning.convert import convert as copy
    from nemo_minitron.sources.open import is_checkpoint

    if not is_checkpoint(checkpoint):
        raise InputError(f"'{checkpoint}' is no checkpoint of NeMo 2 or Megatron-Bridge, whose folder to give")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"'{out}' already exists; give a new folder")
    check_writable(out)
    copy(checkpoint, out)
    print(f"{out}: a Hugging Face folder with the weights of {checkpoint}")
