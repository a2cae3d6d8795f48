"""A recipe as YAML: the same keys as in JSON, and plain values only."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from nemo_minitron.artifacts.json_types import Json, JsonObject
from nemo_minitron.artifacts.parse import shown, unique
from nemo_minitron.errors import InputError

LARGEST = 1 << 20  # bytes; no shipped recipe has more than a hundredth of it


class Loader(yaml.SafeLoader):
    """Reads plain values. A name that occurs twice is refused. An alias, `*name`, is refused too: a few lines of
    aliases can expand without end. 1e-4 is a number here; in YAML 1.1 it is a text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> JsonObject:
        pairs = [(self._value(name), self._value(value)) for name, value in node.value]
        for name, _ in pairs:
            if not isinstance(name, str):
                raise ValueError(f"the key {shown(name)} is no text")
        return unique(pairs)

    def _value(self, node: yaml.Node) -> Json:
        return self.construct_object(node, deep=True)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias, *NAME; write the value out")
        return super().compose_node(parent, index)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> Json:
    """The values of a YAML file. Raises InputError if it cannot be read, is too long, or is no YAML of plain values."""
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"the recipe '{path}' has {path.stat().st_size:,} bytes; no recipe is so long")
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise InputError(f"the recipe '{path}' does not exist") from None
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"the recipe '{path}'{line} is no YAML: {error.problem or error.context}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"the recipe '{path}' cannot be read: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"the recipe '{path}' is nested too deep") from None
