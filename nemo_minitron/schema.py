"""A setting: a field of a dataclass that says what it means and which values are legal.

The fields' metadata makes a recipe's checks, the options of the command line, their `--help` and docs/reference.md.
So a name, a default and a range are written once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MODEL, METHOD, LAYOUT, MACHINES, OUTPUT = "Model and data", "Method", "Layout", "Machines", "Output"
PANELS = (MODEL, METHOD, LAYOUT, MACHINES, OUTPUT)  # the sections of `--help`, in this order
ANY_MODEL = "Hugging Face folder, hub id, or checkpoint of NeMo or Megatron-Bridge"  # what `open_source` reads
MOST = 2**31 - 1  # the largest count: Megatron's index files store 32 bits
SEEDS = 2**32 - 1  # the generator of Megatron's data sets takes no larger seed
TOKENS = 10**15  # the most tokens of a training; the largest published ones have 10**13 to 10**14


class Unasked(int):
    """A default size, which nobody asked for. If it does not fit the model, the text or the layout, a size that fits
    takes its place. A size that somebody wrote is a plain int, and is refused if it does not fit."""


class UnaskedRate(float):
    """A default learning rate, which gives way as `Unasked` does."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a field means and which values are legal, besides its name, type and default.

    `least` and `most` bound a whole number. `above_zero` says that a number may not be 0. `legal` are all legal texts.
    `flag` is the option's name if it differs from the field's. `panel` is the section of `--help` that has the option.
    `recipe_only` says why the command line does not have it. `repeated` is the separator that joins the texts of an
    option that may be given several times.
    """

    help: str
    least: int = 1
    most: int = MOST
    above_zero: bool = False
    legal: tuple[str, ...] = ()
    flag: str = ""
    panel: str = METHOD
    recipe_only: str = ""
    repeated: str = ""


def known_as(help: str, *, legal: Sequence[str] = (), **more: Any) -> Mapping[str, Setting]:
    """The metadata of a field that has no default, or that makes its default with a factory."""
    return {"setting": Setting(help, legal=tuple(legal), **more)}


def setting(default: Any, help: str, *, derived: bool = False, **more: Any) -> Any:
    """A dataclass field with its Setting. `derived`: the default gives way if it does not fit (`Unasked`)."""
    if derived:
        default = UnaskedRate(default) if isinstance(default, float) else Unasked(default)
    return dataclasses.field(default=default, metadata=known_as(help, **more))


def seed_setting(default: int = 1234, help: str = "The seed of random draws.", **more: Any) -> Any:
    """The field of a seed: a whole number from 0 to `SEEDS`."""
    return setting(default, help, **({"least": 0, "most": SEEDS} | more))


def described(field: dataclasses.Field) -> Setting | None:
    """A field's Setting. None for a field that is no setting: a group of settings, or a value that nobody sets."""
    return field.metadata.get("setting")


def settings_of(kind: type[DataclassInstance]) -> Mapping[str, Setting]:
    """Field's name -> its Setting, in the order of the dataclass `kind`."""
    metadata = {field.name: described(field) for field in dataclasses.fields(kind)}
    return {name: known for name, known in metadata.items() if known is not None}


def asked_for(value: object) -> bool:
    """Whether somebody wrote this value. Only a default that can be derived (`Unasked`) knows that nobody did."""
    return not isinstance(value, (Unasked, UnaskedRate))


def settled(settings: Any) -> Any:
    """The same settings in plain numbers: after this, no size is known as one that nobody asked for.

    A framework that writes settings down, as NeMo does into a checkpoint's context, knows plain numbers only.
    """
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    plain: dict[str, int | float] = {name: int(value) for name, value in values.items() if isinstance(value, Unasked)}
    plain |= {name: float(value) for name, value in values.items() if isinstance(value, UnaskedRate)}
    return dataclasses.replace(settings, **plain)
