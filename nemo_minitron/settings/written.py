"""A job as a recipe file that a user reads and changes: YAML or Python, with the settings that are not at their
defaults."""

from __future__ import annotations

import dataclasses
from typing import Any

from nemo_minitron.schema import asked_for
from nemo_minitron.settings.recipe import Job

WIDTH = 100  # of a line of YAML


def as_yaml(job: Job) -> str:
    """The text of a YAML recipe: `minitron compress FILE.yaml` runs the same job."""
    import yaml

    return yaml.safe_dump(_plain(_changed(job)), sort_keys=False, allow_unicode=True, width=WIDTH)


def as_python(job: Job) -> str:
    """The text of a Python recipe: `minitron compress FILE.py` runs the same job."""
    names = sorted({"Job", *(type(group).__name__ for group in _groups(job))})
    return f"from nemo_minitron.job import {', '.join(names)}\n\n\ndef recipe() -> Job:\n    return {_call(job, 4)}\n"


def _changed(group: Any) -> dict[str, Any]:
    """Field -> value, of the fields that have no default or another value. A derived size is always written out."""
    values = {}
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        changed = value != default or asked_for(value) != asked_for(default)
        if changed or (dataclasses.is_dataclass(value) and _changed(value)):
            values[field.name] = value
    return values


def _groups(group: Any) -> list[Any]:
    """The groups of settings in a job that are written, those in tuples included."""
    inside: list[Any] = []
    for value in _changed(group).values():
        items = value if isinstance(value, tuple) else (value,)
        for item in items:
            if dataclasses.is_dataclass(item):
                inside += [item, *_groups(item)]
    return inside


def _plain(value: Any) -> Any:
    """A value as YAML stores it."""
    if dataclasses.is_dataclass(value):
        return _plain(_changed(value))
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    for kind in (bool, int, float):  # a derived size is of a subclass, which YAML does not know
        if isinstance(value, kind):
            return kind(value)
    return value


def _call(group: Any, indent: int) -> str:
    """A group of settings as Python calls it, a setting a line."""
    inner = " " * (indent + 4)
    lines = [f"{inner}{name}={_literal(value, indent + 4)},\n" for name, value in _changed(group).items()]
    return f"{type(group).__name__}(\n{''.join(lines)}{' ' * indent})" if lines else f"{type(group).__name__}()"


def _literal(value: Any, indent: int) -> str:
    if dataclasses.is_dataclass(value):
        return _call(value, indent)
    if isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value):
        items = [f"{' ' * (indent + 4)}{_literal(item, indent + 4)},\n" for item in value]
        return f"(\n{''.join(items)}{' ' * indent})"
    return repr(tuple(value) if isinstance(value, tuple) else _plain(value))
