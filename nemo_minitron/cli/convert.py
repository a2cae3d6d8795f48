"""`minitron convert`: a checkpoint, or a model that reads pictures -> a Hugging Face folder of its text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint of NeMo 2 or of Megatron-Bridge, or the folder or hub id of a model that reads pictures, "
            "too (Gemma3ForConditionalGeneration)."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the model.")],
) -> None:
    """Copy a checkpoint, or the text of a model that reads pictures, to a Hugging Face folder, which every host reads.

    It needs neither NeMo nor Megatron-Bridge.

    minitron convert CHECKPOINT folder
    """
    from nemo_minitron.commands.place import check_writable
    from nemo_minitron.errors import InputError
    from nemo_minitron.families import resolve
    from nemo_minitron.pruning.convert import convert as copy
    from nemo_minitron.sources.open import is_checkpoint
    from nemo_minitron.sources.text_of import reads_pictures

    folder = resolve(model)
    if not folder.exists():
        raise InputError(f"'{model}' does not exist; give a checkpoint's folder, or a model that reads pictures")
    if not is_checkpoint(folder) and not reads_pictures(folder):
        raise InputError(
            f"'{model}' is neither a checkpoint of NeMo 2 or Megatron-Bridge nor a model that reads pictures; a "
            "Hugging Face folder of text needs no conversion"
        )
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"'{out}' already exists; give a new folder")
    check_writable(out)
    copy(folder, out)
    print(f"{out}: a Hugging Face folder with the weights of {model}")
