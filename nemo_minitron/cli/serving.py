"""`minitron serving`: the commands that serve a student."""

from __future__ import annotations

from typing import Annotated

import typer

from nemo_minitron.cli.options import Taking
from nemo_minitron.schema import METHOD
from nemo_minitron.settings.layout import Layout

NOTES = {  # engine -> what its commands need that pip does not bring
    "llama_cpp": "; the script lies in github.com/ggml-org/llama.cpp",
    "ollama": "; after llama.cpp's first command",
}


def serving(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, such as a run's student, or hub id.")],
    layout: Annotated[Layout, Taking("tp")],
    precision: Annotated[
        str, typer.Option(help="Precision of the weights: bf16 or fp8.", rich_help_panel=METHOD)
    ] = "bf16",
) -> None:
    """Print the commands that serve a model in vLLM, TensorRT-LLM, llama.cpp and Ollama. Nothing is started.

    minitron serving runs/demo/student
    """
    from nemo_minitron.export import serving_commands
    from nemo_minitron.families import from_hf, read_config, remark_on, resolve, unserved
    from nemo_minitron.sources.folder import HFSource

    folder = resolve(model)
    engines = serving_commands(folder, precision=precision, tp=layout.tp)
    HFSource(folder)  # a folder whose weights are missing or cut short would fail in the engine, after minutes
    for engine, commands in engines.items():
        print("\n".join([f"# {engine}{NOTES.get(engine, '')}", *commands]))
    for engine, why in unserved(read_config(folder)).items():
        print(f"# remark: {engine} is left out: it {why}")
    if sentence := remark_on(from_hf(folder), read_config(folder)):
        print(f"# remark: {sentence}")
