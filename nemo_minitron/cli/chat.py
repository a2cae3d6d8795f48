"""`minitron chat`: a conversation with a student, and with its teacher beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Optional

import typer

from nemo_minitron.cli.options import integer
from nemo_minitron.schema import ANY_MODEL, METHOD, MODEL

BESIDE = "Another model that answers the same lines, such as the teacher."
NEW = "Tokens of an answer, at most."
WARM = "Temperature at which tokens are drawn; 0: always the likeliest one."
SYSTEM = "System message at the start of the conversation."


def chat(
    student: Annotated[str, typer.Argument(help=f"{ANY_MODEL}.")],
    beside: Annotated[Optional[str], typer.Option(help=BESIDE, rich_help_panel=MODEL)] = None,
    system: Annotated[str, typer.Option(help=SYSTEM, rich_help_panel=METHOD)] = "",
    new_tokens: Annotated[int, typer.Option(help=NEW, rich_help_panel=METHOD, parser=integer)] = 256,
    temperature: Annotated[float, typer.Option(help=WARM, rich_help_panel=METHOD)] = 0.0,
    seed: Annotated[int, typer.Option(help="The seed of the draws.", rich_help_panel=METHOD)] = 0,
    precision: Annotated[str, typer.Option(help="Precision of the models: bf16 or fp32.", rich_help_panel=METHOD)] = (
        "bf16"
    ),
) -> None:
    """Talk to a student, and to its teacher beside it. Each line of a pipe is a message, too.

    minitron chat runs/demo/student --beside models/teacher

    echo "What is a star?" | minitron chat runs/demo/student
    """
    import math

    from nemo_minitron.commands.chat import run_chat
    from nemo_minitron.errors import InputError
    from nemo_minitron.settings.validated import check_whole

    check_whole("new_tokens", new_tokens)
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InputError(f"temperature is {temperature}; it must be 0 or more, and finite")
    models = {"student": student} | ({"beside": beside} if beside else {})
    answered = run_chat(
        models, _lines(), sys.stdout, new_tokens=new_tokens, temperature=temperature, seed=seed, system=system,
        precision=precision,
    )  # fmt: skip
    if not answered:
        raise InputError("no message came; write a line, or give it by a pipe: echo 'Hello' | minitron chat STUDENT")


def _lines() -> Iterator[str]:
    """The lines of standard input. A terminal shows a mark before each."""
    terminal = sys.stdin.isatty()
    if terminal:
        print("an empty line or Ctrl-D ends the conversation", file=sys.stderr)
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or (terminal and not line.strip()):
            return
        yield line
