"""The context of a NeMo checkpoint, read as data.

NeMo would import and call what `io.json` names. Here nothing is imported or called: the file is JSON, its
values are looked up, and `model.yaml` (which has the fields that were left at their defaults) goes through
YAML's safe loader.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.files import read_json
from nemo_minitron.errors import InputError
from nemo_minitron.families import family_of_nemo


@dataclasses.dataclass(frozen=True)
class Context:
    """Names of NeMo's classes and the fields of the model's config, plain values only."""

    model_class: str
    config_class: str
    config: Mapping[str, Any]


def read_context(folder: str | Path) -> Context:
    """Raises InputError where the context is missing, damaged or of another shape than NeMo 2's."""
    folder = Path(folder)
    objects = read_json(folder / "io.json", "the NeMo checkpoint's context")
    try:
        graph = _Graph(objects["objects"])
        model = graph.child(objects["root"]["key"], "model")
        config = graph.child(model, "config")
        fields = _defaults(folder) | graph.fields(config)
        return Context(graph.class_of(model), graph.class_of(config), fields)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the context '{folder}' is not NeMo 2's: {type(error).__name__} {error}") from None


def _defaults(folder: Path) -> dict[str, Any]:
    """All fields of the model's config as NeMo wrote them down for people."""
    import yaml

    try:
        values = yaml.safe_load((folder / "model.yaml").read_text())
        return {name: value for name, value in values["config"].items() if _plain(value)}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"'{folder / 'model.yaml'}' cannot be read: {error}") from None


def _plain(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(item is None or isinstance(item, (bool, int, float, str)) for item in items)


class _Graph:
    """fiddle's serialised objects: each has a type, items, and a reference to its metadata."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self.objects = objects

    def child(self, key: str, name: str) -> str:
        return dict(self._items(key))[name]["key"]

    def fields(self, key: str) -> dict[str, Any]:
        found = {name: self._value(value) for name, value in self._items(key)}
        return {name: value for name, value in found.items() if value is not _OPAQUE}

    def class_of(self, key: str) -> str:
        metadata = self.objects[key]["metadata"]["key"]
        return dict(self._items(metadata))["fn_or_cls"]["name"]

    def _items(self, key: str) -> list[tuple[str, Any]]:
        return [(re.sub(r".*'(.*)'.*", r"\1", name), value) for name, value in self.objects[key]["items"]]

    def _value(self, value: Mapping[str, Any]) -> Any:
        if value["type"] == "leaf":
            return value["value"]
        if value["type"] == "ref" and self.objects[value["key"]]["type"].get("name") in ("list", "tuple"):
            return [self._value(item) for _, item in self.objects[value["key"]]["items"]]
        return _OPAQUE


_OPAQUE = object()


def hf_config(checkpoint: str | Path) -> dict[str, Any]:
    """The Hugging Face config that a NeMo checkpoint's context stands for. Raises InputError."""
    context = read_context(Path(checkpoint) / "context")
    return family_of_nemo(context.model_class).from_nemo(context.config)
