"""A command, written as a function of settings -> the function that typer reads, with an option for each setting.

A parameter whose type is a group of settings stands for the options of its fields (`schema.Setting`). A setting that is
not on the command line keeps the default object of its field, so that `schema.asked_for` knows that nobody asked.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Optional, get_args, get_origin, get_type_hints

import typer

from nemo_minitron.cli.nodes import Machines
from nemo_minitron.errors import InputError
from nemo_minitron.schema import MODEL, OUTPUT, PANELS, Setting, asked_for, settings_of
from nemo_minitron.settings.numbers import EXAMPLES, whole_number
from nemo_minitron.settings.own_model import FIELD

SOURCES = (
    "Text, JSONL, CSV or Parquet file or pattern, .bin/.idx prefix, or `datasets` source NAME, NAME:CONFIG, NAME@SPLIT"
)
Data = Annotated[
    str, typer.Option("--data", help=f"{SOURCES}. Without @SPLIT: the train split.", rich_help_panel=MODEL)
]
SKIP = "Leave out lines that cannot be read, and say how many."
SkipBadLines = Annotated[bool, typer.Option("--skip-bad-lines", help=SKIP, rich_help_panel=MODEL)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.", rich_help_panel=OUTPUT)]
LOG = "Trackers of the training's numbers: tensorboard, wandb, mlflow, separated by commas."
Log = Annotated[str, typer.Option("--log", help=LOG, show_default=False, rich_help_panel=OUTPUT)]
WITH_FIELD = ("data", "validation")  # options whose source takes the field of --field
KEYWORD = inspect.Parameter.KEYWORD_ONLY
CONTEXT = "command_line"


@dataclasses.dataclass(frozen=True, init=False)
class Taking:
    """Annotation of a group: the fields that become options (all if none is named), and fixed values of others."""

    only: tuple[str, ...]
    fixed: Mapping[str, object]

    def __init__(self, *only: str, **fixed: object) -> None:
        object.__setattr__(self, "only", only)
        object.__setattr__(self, "fixed", fixed)


@dataclasses.dataclass(frozen=True)
class Overriding:
    """Annotation of a `dict`: options without defaults for the fields of a recipe's group `name`. The command gets
    those that were given."""

    group: type
    name: str


@dataclasses.dataclass(frozen=True)
class Group:
    """A parameter of a command that stands for options. `fields`: name -> its Setting. `fixed`: values of others."""

    kind: type
    fields: Mapping[str, Setting]
    fixed: Mapping[str, object]
    override: str = ""

    @classmethod
    def of(cls, annotation: object) -> Group | None:
        """The group of a parameter; None if the parameter is a single option."""
        kind, *extra = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        if extra and isinstance(extra[0], Overriding):
            return cls(extra[0].group, settings_of(extra[0].group), {}, extra[0].name)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            return None
        taking = extra[0] if extra else Taking()
        fields = {name: known for name, known in settings_of(kind).items() if name in (taking.only or (name,))}
        return cls(kind, {n: k for n, k in fields.items() if not k.recipe_only or n in taking.only}, taking.fixed)

    def build(self, given: Mapping[str, object]) -> Any:
        """The settings from `given`, the options of the command line. Raises InputError for an illegal value."""
        hints = get_type_hints(self.kind)
        values = {
            name: _read(hints[name], given[name], name, self.fields[name]) for name in self.fields if name in given
        }
        if self.override:
            return values
        settings = self.kind(**self.fixed, **values)
        if getattr(settings, "precision", "") == "auto":
            from nemo_minitron.settings.precision import best_precision

            settings = dataclasses.replace(settings, precision=best_precision())
        return settings

    def parameters(self) -> Iterator[inspect.Parameter]:
        """A parameter for each option, as typer reads it."""
        hints = get_type_hints(self.kind)
        defaults = {field.name: field.default for field in dataclasses.fields(self.kind)}
        for name, known in self.fields.items():
            yield _parameter(name, hints[name], known, None if self.override else defaults[name], self.override)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The function that typer reads: its options are in the order of their panels, and it builds groups from them."""
    declared = inspect.signature(command, eval_str=True).parameters
    groups = {name: group for name, parameter in declared.items() if (group := Group.of(parameter.annotation))}

    def run(**values: Any) -> None:
        context = values.pop(CONTEXT)
        if takes_field and (field := values.pop("field")):
            from nemo_minitron.data.text import with_field

            values |= {name: with_field(values[name], field) for name in WITH_FIELD if values.get(name)}
        given = {n: v for n, v in values.items() if context.get_parameter_source(n).name != "DEFAULT"}
        arguments = {name: group.build(given) for name, group in groups.items()}
        arguments |= {name: values[name] for name in declared if name not in groups}
        if takes_field:
            from nemo_minitron.data import check_texts

            sources = filter(None, (arguments.get(name) for name in WITH_FIELD))
            check_texts(sources, bool(arguments.get("skip_bad_lines")))
        machines = [name for name, group in groups.items() if group.kind is Machines]
        for name in machines:  # nodes compare their commands by name and arguments
            same = {key: _plain(value) for key, value in arguments.items() if key not in (*machines, "out")}
            arguments[name] = dataclasses.replace(arguments[name], job=[command.__name__, same])
        command(**arguments)

    takes_field = "data" in declared and get_args(declared["data"].annotation)[0] in (str, Optional[str])
    parameters = [parameter for name in declared for parameter in _expanded(declared[name], groups.get(name))]
    if takes_field:
        option = typer.Option(help=FIELD, rich_help_panel=MODEL)
        parameters.append(inspect.Parameter("field", KEYWORD, default="", annotation=Annotated[str, option]))
    parameters.sort(key=_panel)
    context = inspect.Parameter(CONTEXT, KEYWORD, annotation=typer.Context)
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (context, *parameters)}
    return run


def _expanded(parameter: inspect.Parameter, group: Group | None) -> list[inspect.Parameter]:
    return list(group.parameters()) if group else [parameter.replace(kind=KEYWORD)]


def _panel(parameter: inspect.Parameter) -> int:
    """The sort key: arguments first, then panel after panel. The sort keeps the command's order within a panel."""
    info = get_args(parameter.annotation)[1]
    return -1 if not isinstance(info, type(typer.Option())) else PANELS.index(info.rich_help_panel)


def _parameter(name: str, kind: object, known: Setting, default: object, override: str) -> inspect.Parameter:
    flag = known.flag or "--" + name.replace("_", "-")
    if kind is bool and default is not False:
        flag += f"/--no-{flag[2:]}"
    help = f"{known.help} It sets {override}.{name} of the recipe." if override else known.help
    option_type: object = next((plain for plain in (int, float, bool) if plain in (kind, *get_args(kind)[:1])), str)
    option_type = str if kind == float | str else option_type
    option_type = list[str] if known.repeated else str if get_origin(kind) is tuple else option_type
    option_type = Optional[option_type] if default is None else option_type
    show_default: Any = default not in ("", (), None)
    if not asked_for(default):
        show_default = f"{default}, or what fits"
    if known.repeated and default is not None:
        default = [default]
    parser: Any = integer if int in (option_type, *get_args(option_type)) else None
    parser = number_or_name if kind == float | str else parser
    option = typer.Option(flag, help=help, rich_help_panel=known.panel, show_default=show_default, parser=parser)
    return inspect.Parameter(name, KEYWORD, default=default, annotation=Annotated[option_type, option])


def integer(text: str | int) -> int:
    """A whole number as people write it: 60000, 60k, 1e9."""
    number = whole_number(text) if isinstance(text, str) else text
    if number is None:
        raise typer.BadParameter(f"{text!r} is not a valid integer; write for example {EXAMPLES}")
    return number


def number_or_name(text: str | float) -> float | str:
    """A number, or the text that names another value."""
    try:
        return float(text)
    except ValueError:
        return text


def _read(kind: object, value: Any, name: str, known: Setting) -> Any:
    """An option's value as its field stores it: the texts of a repeated option joined, a list split at its commas."""
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


def _plain(value: object) -> object:
    """An argument of a command as plain values, for a digest."""
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)  # type: ignore[arg-type]
    return value if isinstance(value, (int, float, str, bool, dict, type(None))) else str(value)
