"""A command, written as a function of settings -> the function that typer reads, with an option for each setting.

A parameter whose type is a group of settings stands for the options of its fields (`schema.Setting`). What is not given
on the command line keeps the very default of the field, so that a size that nobody asked for is known as such.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Optional, get_args, get_origin, get_type_hints

import typer

from nemo_minitron.cli.nodes import Machines
from nemo_minitron.errors import InputError
from nemo_minitron.schema import MODEL, PANELS, Setting, asked_for, settings_of

SOURCES = "Text file, JSONL, .bin/.idx prefix, or `datasets` NAME, NAME:CONFIG, NAME@SPLIT"
Data = Annotated[str, typer.Option("--data", help=f"{SOURCES}; the train split unless given.", rich_help_panel=MODEL)]
SKIP = "Leave out lines that cannot be read, and count them."
SkipBadLines = Annotated[bool, typer.Option("--skip-bad-lines", help=SKIP, rich_help_panel=MODEL)]
KEYWORD = inspect.Parameter.KEYWORD_ONLY
CONTEXT = "command_line"


@dataclasses.dataclass(frozen=True, init=False)
class Taking:
    """Beside a group: the fields that become options, all of them unless named, and fixed values of others."""

    only: tuple[str, ...]
    fixed: Mapping[str, Any]

    def __init__(self, *only: str, **fixed: Any) -> None:
        object.__setattr__(self, "only", only)
        object.__setattr__(self, "fixed", fixed)


@dataclasses.dataclass(frozen=True)
class Overriding:
    """Beside `dict`: options without defaults, of the fields of a recipe's group `name`; what is given is handed on."""

    group: type
    name: str


@dataclasses.dataclass(frozen=True)
class Group:
    """A parameter of a command that stands for options; `fields` are their names and settings."""

    kind: Any
    fields: Mapping[str, Setting]
    fixed: Mapping[str, Any]
    override: str = ""

    @classmethod
    def of(cls, annotation: Any) -> Group | None:
        """None for a parameter that is one option."""
        kind, *extra = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        if extra and isinstance(extra[0], Overriding):
            return cls(extra[0].group, settings_of(extra[0].group), {}, extra[0].name)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            return None
        taking = extra[0] if extra else Taking()
        fields = {name: known for name, known in settings_of(kind).items() if name in (taking.only or (name,))}
        return cls(kind, {n: k for n, k in fields.items() if not k.recipe_only or n in taking.only}, taking.fixed)

    def build(self, asked: Mapping[str, Any]) -> Any:
        """The settings; `asked`: what was given on the command line. Raises InputError for what is not legal."""
        hints = get_type_hints(self.kind)
        given = {
            name: _read(hints[name], asked[name], name, self.fields[name]) for name in self.fields if name in asked
        }
        if self.override:
            return given
        made = self.kind(**self.fixed, **given)
        if getattr(made, "precision", "") == "auto":
            from nemo_minitron.settings.precision import best_precision

            made = dataclasses.replace(made, precision=best_precision())
        return made

    def parameters(self) -> Iterator[inspect.Parameter]:
        hints, defaults = (
            get_type_hints(self.kind),
            {field.name: field.default for field in dataclasses.fields(self.kind)},
        )
        for name, known in self.fields.items():
            yield _parameter(name, hints[name], known, None if self.override else defaults[name], self.override)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """What typer takes: options in the order of their panels, and groups built of what was asked for."""
    own = inspect.signature(command, eval_str=True).parameters
    groups = {name: group for name, parameter in own.items() if (group := Group.of(parameter.annotation))}

    def run(**values: Any) -> None:
        context = values.pop(CONTEXT)
        asked = {n: v for n, v in values.items() if context.get_parameter_source(n).name != "DEFAULT"}
        made = {name: group.build(asked) for name, group in groups.items()}
        made |= {name: values[name] for name in own if name not in groups}
        machines = [name for name, group in groups.items() if group.kind is Machines]
        for name in machines:  # they know each other's command by what it was asked to do
            same = {key: _plain(value) for key, value in made.items() if key not in (*machines, "out")}
            made[name] = dataclasses.replace(made[name], job=[command.__name__, same])
        command(**made)

    parameters = [parameter for name in own for parameter in _expanded(own[name], groups.get(name))]
    parameters.sort(key=_panel)
    context = inspect.Parameter(CONTEXT, KEYWORD, annotation=typer.Context)
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (context, *parameters)}
    return run


def _expanded(parameter: inspect.Parameter, group: Group | None) -> list[inspect.Parameter]:
    return list(group.parameters()) if group else [parameter.replace(kind=KEYWORD)]


def _panel(parameter: inspect.Parameter) -> int:
    """Arguments first, then panel after panel; within one as the command has them."""
    info = get_args(parameter.annotation)[1]
    return -1 if not isinstance(info, type(typer.Option())) else PANELS.index(info.rich_help_panel)


def _parameter(name: str, kind: Any, known: Setting, default: Any, override: str) -> inspect.Parameter:
    flag = known.flag or "--" + name.replace("_", "-")
    if kind is bool and default is not False:
        flag += f"/--no-{flag[2:]}"
    words = f"{known.help} Sets {override}.{name} of the recipe." if override else known.help
    kinds = (int, float, bool)
    shown: Any = next((plain for plain in kinds if plain in (kind, *get_args(kind)[:1])), str)
    shown = list[str] if known.repeated else str if get_origin(kind) is tuple else shown
    shown = Optional[shown] if default is None else shown
    said: Any = default not in ("", (), None)
    said = said if asked_for(default) else f"{default}, or what fits"
    if known.repeated and default is not None:
        default = [default]
    option = typer.Option(flag, help=words, rich_help_panel=known.panel, show_default=said)
    return inspect.Parameter(name, KEYWORD, default=default, annotation=Annotated[shown, option])


def _read(kind: Any, value: Any, name: str, known: Setting) -> Any:
    """An option's value as its field has it: texts of a repeated option joined, lists split at their commas."""
    if known.repeated:
        return known.repeated.join(value)
    if get_origin(kind) is not tuple:
        return value
    names = [text.strip() for text in value.split(",") if text.strip()]
    if get_args(kind)[0] is not int:
        return tuple(names)
    for text in names:
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"'{text}' in {flag} is no size; write whole numbers, for example 1,2,6")
    return tuple(map(int, names))


def _plain(value: Any) -> Any:
    """A value of a command, as a digest takes it."""
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)  # type: ignore[arg-type]
    return value if isinstance(value, (int, float, str, bool, dict, type(None))) else str(value)
