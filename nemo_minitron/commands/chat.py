"""A conversation on the terminal, or over a pipe, with one model or with two side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TextIO

from nemo_minitron.commands.corpus import begin, say
from nemo_minitron.pruning.convert import as_folder
from nemo_minitron.sources.open import config_of


def run_chat(
    models: dict[str, str], lines: Iterable[str], out: TextIO, *, new_tokens: int, temperature: float = 0.0,
    seed: int = 0, system: str = "", precision: str = "bf16",
) -> int:  # fmt: skip
    """`minitron chat`: answers each line with every model of `models` (name -> folder, hub id or NeMo checkpoint), and
    writes the answers to `out` while they are made. Gives the number of lines. With several models each answer begins
    with its model's name. Raises InputError, before a model is loaded, for what is no model."""
    from nemo_minitron.evaluation.chat import Speaker, seed_draws
    from nemo_minitron.evaluation.model import check_loads

    for model in models.values():
        check_loads(config_of(model), "chat")
    begin(f"loading {' and '.join(models.values())}")
    seed_draws(seed)
    with contextlib.ExitStack() as stack:
        speakers = {}
        for name, model in models.items():
            folder = stack.enter_context(as_folder(model))
            speakers[name] = Speaker(
                folder, new_tokens=new_tokens, temperature=temperature, system=system, precision=precision
            )
            if not speakers[name].templated:
                say(f"'{model}' has no chat template: it continues each line, and remembers nothing")

        def show(text: str) -> None:
            out.write(text)
            out.flush()

        answered = 0
        for line in filter(None, map(str.strip, lines)):
            for name, speaker in speakers.items():
                if len(speakers) > 1:
                    show(f"[{name}] ")
                speaker.answer(line, show)
                show("\n")
            answered += 1
    return answered
