"""The context of a NeMo checkpoint, read as data.

NeMo would import and call the classes that `io.json` names. Here nothing is imported or called: the file is parsed as
JSON and its values are looked up. `model.yaml`, which also has the fields that were left at their defaults, is read
with YAML's safe loader.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import yaml

from nemo_minitron.artifacts.files import read_json, write_json
from nemo_minitron.artifacts.json_types import HfConfig, Json, JsonFields, JsonObject
from nemo_minitron.artifacts.parse import anything, mapped
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.families import family_of_nemo
from nemo_minitron.families.side_files import TOKENIZER_CONFIG, check_link, copy_side_file

WHAT = "the NeMo checkpoint's context"
LARGEST_YAML = 1 << 24  # bytes
MOST_VALUES = 1 << 17  # most values of all fields of a config; references to one object could repeat it endlessly


@dataclasses.dataclass(frozen=True)
class Context:
    """Names of NeMo's classes and the fields of the model's config, as plain values; a function is given by its dotted
    name."""

    model_class: str
    config_class: str
    config: HfConfig


def read_context(folder: str | Path) -> Context:
    """Reads a context. Raises InputError if it is missing, damaged or not in the form of NeMo 2."""
    folder = Path(folder)
    objects = read_json(folder / "io.json", WHAT, mapped(anything(64)))
    try:
        graph = _Graph(objects["objects"])
        model = graph.child(objects["root"]["key"], "model")
        config = graph.child(model, "config")
        fields = _defaults(folder) | graph.fields(config)
        return Context(graph.class_of(model), graph.class_of(config), fields)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the context '{folder}' is not NeMo 2's: {type(error).__name__} {error}") from None


def tokenizer_folder(checkpoint: str | Path) -> Path:
    """The folder in a NeMo checkpoint's context that holds its tokenizer; it need not exist."""
    context = Path(checkpoint) / "context"
    objects = read_json(context / "io.json", WHAT, mapped(anything(64)))
    try:
        graph = _Graph(objects["objects"])
        model = graph.child(objects["root"]["key"], "model")
        name = graph.fields(graph.child(model, "tokenizer"))["pretrained_model_name"]
        folder = context / Path(name).name
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        return context / "nemo_tokenizer"
    return folder if os.path.isdir(folder) else context / "nemo_tokenizer"


def resize_context(source: str | Path, target: str | Path, sizes: JsonFields) -> None:
    """Copies a checkpoint's context and changes fields of the model's config; everything is handled as data.

    The other records of NeMo (classes, optimizer, trainer) are copied unchanged, the tokenizer without its code. Raises
    InputError as `read_context` does, and for a symbolic link out of the context's folder.
    """
    read_context(source)
    shutil.copytree(source, target, ignore=lambda folder, names: _code(Path(source), Path(folder), names))
    for file in Path(target).rglob(TOKENIZER_CONFIG):
        copy_side_file(file, file)
    record = read_json(Path(target) / "io.json", WHAT)
    graph = _Graph(record["objects"])
    model = graph.child(record["root"]["key"], "model")
    graph.set(graph.child(model, "config"), sizes)
    graph.distrust_tokenizers()
    write_json(Path(target) / "io.json", record)
    written = _yaml(Path(target) / "model.yaml")
    written["config"] |= sizes
    (Path(target) / "model.yaml").write_text(yaml.safe_dump(written))


def _code(context: Path, folder: Path, names: list[str]) -> list[str]:
    """The names in a folder of a context that are not copied: code."""
    for name in names:
        check_link(folder / name, context)
    return [name for name in names if name.endswith(".py") or name == "__pycache__"]


def _defaults(folder: Path) -> JsonObject:
    """All fields of the model's config from model.yaml, which NeMo writes for people."""
    named = {name: _function(value) for name, value in _yaml(folder / "model.yaml")["config"].items()}
    return {name: value for name, value in named.items() if _plain(value)}


def _yaml(file: Path) -> JsonObject:
    """The values of model.yaml, with `config`, an object. Raises InputError if it cannot be read.

    YAML aliases can make the values much larger than the file, but only plain values of it are used here."""
    try:
        if file.stat().st_size > LARGEST_YAML:
            raise ValueError(f"it has more than {LARGEST_YAML} bytes")
        values = yaml.safe_load(file.read_text())
        if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
            raise ValueError("it has no config")
        return values
    except (OSError, yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(f"'{file}' cannot be read: {first_line(error)}") from None


def _function(value: Json) -> Json:
    """The dotted name if the value is a function; the number if the value is a text such as `1e-5`, which YAML 1.1
    does not read as a number without a point; else the value itself."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+e[+-]?[0-9]{1,3}", value):
        return float(value)
    if isinstance(value, Mapping) and value.get("_call_") is False and "_target_" in value:
        return str(value["_target_"])
    return value


def _plain(value: Json) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(item is None or isinstance(item, (bool, int, float, str)) for item in items)


class _Graph:
    """The objects that fiddle serialised: each has a type, items, and a reference to its metadata."""

    def __init__(self, objects: JsonFields) -> None:
        self.objects, self._left = objects, MOST_VALUES

    def child(self, key: str, name: str) -> str:
        return dict(self._items(key))[name]["key"]

    def fields(self, key: str) -> JsonObject:
        values = {name: self._value(value) for name, value in self._items(key)}
        return {name: value for name, value in values.items() if value is not _OPAQUE}

    def set(self, key: str, values: JsonFields) -> None:
        """Sets plain fields; a field that was left at its default is added to the argument names."""
        items = self.objects[key]["items"]
        names = self.objects[dict(self._items(self.objects[key]["metadata"]["key"]))["argument_names"]["key"]]["items"]
        for name, value in values.items():
            label, leaf = f"Attr(name='{name}')", {"type": "leaf", "value": value, "paths": []}
            places = [i for i, (known, _) in enumerate(items) if known == label]
            if places:
                items[places[0]][1] = leaf
            else:
                items.append([label, leaf])
                names.append([f"Index(index={len(names)})", name])

    def distrust_tokenizers(self) -> None:
        """Forbids every tokenizer in this record to run code beside its files."""
        for recorded in self.objects.values():
            for name, value in recorded["items"]:
                if name == "Attr(name='trust_remote_code')" and value["type"] == "leaf":
                    value["value"] = False

    def class_of(self, key: str) -> str:
        metadata = self.objects[key]["metadata"]["key"]
        return dict(self._items(metadata))["fn_or_cls"]["name"]

    def _items(self, key: str) -> list[tuple[str, Json]]:
        return [(re.sub(r".*'(.*)'.*", r"\1", name), value) for name, value in self.objects[key]["items"]]

    def _value(self, value: JsonFields) -> Json:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"its config has more than {MOST_VALUES} values")
        if value["type"] == "leaf":
            return value["value"]
        if value["type"] == "pyref":
            return f"{value['module']}.{value['name']}"
        if value["type"] == "ref" and self.objects[value["key"]]["type"].get("name") in ("list", "tuple"):
            return [self._value(item) for _, item in self.objects[value["key"]]["items"]]
        return _OPAQUE


_OPAQUE = object()


def hf_config(checkpoint: str | Path) -> JsonObject:
    """The Hugging Face config that corresponds to a NeMo checkpoint's context. Raises InputError as `read_context`
    does."""
    context = read_context(Path(checkpoint) / "context")
    return family_of_nemo(context.model_class, context.config).from_nemo(context.config)
