"""`minitron serving`: the commands that serve a student."""

from __future__ import annotations

from typing import Annotated

import typer

from nemo_minitron.cli.options import Taking
from nemo_minitron.schema import METHOD
from nemo_minitron.settings.layout import Layout


def serving(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, such as a run's student, or hub id.")],
    layout: Annotated[Layout, Taking("tp")],
    precision: Annotated[
        str, typer.Option(help="Precision of the weights: bf16 or fp8.", rich_help_panel=METHOD)
    ] = "bf16",
) -> None:
    """Print the commands that serve a model in vLLM and in TensorRT-LLM. Nothing is started."""
    from nemo_minitron.export import serving_commands
    from nemo_minitron.families import from_hf, read_config, remark_on, resolve

    folder = resolve(model)
    for engine, commands in serving_commands(folder, precision=precision, tp=layout.tp).items():
        print("\n".join([f"# {engine}", *commands]))
    if sentence := remark_on(from_hf(folder), read_config(folder)):
        print(f"# remark: {sentence}")
