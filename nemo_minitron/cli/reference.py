"""docs/reference.md: every setting, made from the schema. `python -m nemo_minitron.cli.reference` writes the page."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from nemo_minitron.artifacts.cache_settings import CacheSettings
from nemo_minitron.cli import COMMANDS
from nemo_minitron.cli.options import Group
from nemo_minitron.schema import MOST, SEEDS, TOKENS, Setting, asked_for, described
from nemo_minitron.settings.finetuning import Finetuning
from nemo_minitron.settings.recipe import Job
from nemo_minitron.settings.step import Step

PAGE = Path("docs/reference.md")
HEAD = """# Every setting

This page is made from the settings themselves by `python -m nemo_minitron.cli.reference`; `tests/cli/test_reference.py`
fails if it is stale. A recipe, in Python, YAML or JSON, has the groups of a job. `minitron compress` takes any setting
as `group.name=value`. The other commands take the settings that concern them as options.

A default marked `*` gives way if it does not fit the layout, the model or the text. The command says so in a line that
begins with `remark:`. A value that you give is never changed; it is refused if it does not fit.
"""
TABLE = "| setting | type | default | legal | option | meaning |\n|---|---|---|---|---|---|\n"


def page() -> str:
    """The whole page."""
    flags, parts = _flags(), [HEAD]
    for title, kind in _groups():
        parts.append(f"\n## {title}\n{_first(kind)}\n\n{TABLE}")
        parts += [_row(kind, field, known, flags) for field in dataclasses.fields(kind) if (known := described(field))]
    return "".join(parts)


def _groups() -> Iterator[tuple[str, type]]:
    """(heading, dataclass) of the job, of each of its groups, and of commands that no job has."""
    yield "The job", Job
    for name, hint in get_type_hints(Job).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield f"`{name}`", hint
    yield "A step of `chain`", Step
    yield "`minitron finetune`", Finetuning
    yield "`minitron cache-logits`", CacheSettings


def _first(kind: type) -> str:
    """The first paragraph of a group's docstring."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())


def _flags() -> dict[tuple[type, str], list[str]]:
    """(dataclass, field) -> the commands that have it as an option."""
    commands: dict[tuple[type, str], list[str]] = {}
    for command in COMMANDS:
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            group = Group.of(parameter.annotation)
            for name in group.fields if group else ():
                assert group is not None
                commands.setdefault((group.kind, name), []).append(command.__name__.replace("_", "-"))
    return commands


def _row(kind: type, field: dataclasses.Field, known: Setting, flags: dict[tuple[type, str], list[str]]) -> str:
    commands = flags.get((kind, field.name), [])
    flag = known.flag or "--" + field.name.replace("_", "-")
    option = f"`{flag}` of {', '.join(commands)}" if commands else f"none: {known.recipe_only}"
    cells = (f"`{field.name}`", _type(get_type_hints(kind)[field.name]), _default(field), _legal(field, known))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, option, known.help)) + " |\n"


def _type(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return f"list of {_type(get_args(hint)[0])}"
    if type(None) in get_args(hint):
        return f"{_type(get_args(hint)[0])} or null"
    if hint == float | str:
        return "number or text"
    plain = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return plain.get(hint, "step" if hint is Step else "group")


def _default(field: dataclasses.Field) -> str:
    if field.default is field.default_factory is dataclasses.MISSING:
        return "required"
    if field.default in ("", (), None, dataclasses.MISSING):
        return "none"
    value = field.default
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return f"`{text}`" + ("" if asked_for(value) else " *")


def _legal(field: dataclasses.Field, known: Setting) -> str:
    if known.legal and field.type != "float | str":
        return ", ".join(f"`{name}`" for name in known.legal if name)
    if field.type == "int":
        ends = {SEEDS: "2^32 - 1", TOKENS: "10^15", 2**63 - 1: "2^63 - 1", 1 << 20: "2^20"}
        end = ends.get(known.most, known.most)
        return f"{known.least} or more" if known.most == MOST else f"{known.least} to {end}"
    number = "above 0" if known.above_zero else "0 or more"
    return {"float": number, "float | str": f"{number}, or `{'`, `'.join(known.legal)}`"}.get(str(field.type), "")


if __name__ == "__main__":
    PAGE.write_text(page())
