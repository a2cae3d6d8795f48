"""A recipe's value: nested frozen dataclasses of plain values, JSON in and out, overridden by `key=value`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin, get_type_hints

from nemo_minitron.errors import InputError, nearest
from nemo_minitron.job.calibration import Calibration
from nemo_minitron.job.counted import Counted
from nemo_minitron.job.cutting import Cutting
from nemo_minitron.job.distillation import Distillation
from nemo_minitron.job.layout import Layout
from nemo_minitron.job.search import Search
from nemo_minitron.search.depth import BLOCK_INFLUENCE


@dataclasses.dataclass(frozen=True)
class Data:
    """Corpora: text, JSONL, a `datasets` name or folder, or a `.bin/.idx` prefix; `calibration` defaults to `train`.

    A `datasets` source is NAME[:CONFIGURATION][@SPLIT], for example `Salesforce/wikitext:wikitext-2-raw-v1@validation`.
    Without @SPLIT `train` and `calibration` are its train split, `test` its test split, never silently another.
    """

    train: str
    test: str
    calibration: str | None = None
    name: str = "corpus"
    licence: str = "unknown"


@dataclasses.dataclass(frozen=True)
class Evaluation(Counted):
    """Perplexity on `tokens` of the held-out corpus, and greedy continuations of `prompts`."""

    tokens: int = 16_384
    sequence_length: int = 512
    batch_size: int = 4
    precision: str = "bf16"
    random_baseline: bool = True
    prompts: tuple[str, ...] = ()
    new_tokens: int = 48


@dataclasses.dataclass(frozen=True)
class Job:
    """The whole job: what `minitron compress` runs. `keep` maps an axis to the size that stays; with a target in
    `search` the other sizes are searched for.

    `base_model` and `licence` are the teacher's name and licence on the model card. `depth`: by which criterion
    layers go: block_influence, or loss, perplexity, accuracy or removal, which the calibration then gathers too.
    `cutting`: what is solved or folded in place of the plan's slices.
    """

    name: str
    teacher: str
    data: Data
    keep: Mapping[str, int] = dataclasses.field(default_factory=dict)
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    distillation: Distillation = dataclasses.field(default_factory=Distillation)
    evaluation: Evaluation = Evaluation()
    layout: Layout = dataclasses.field(default_factory=Layout)
    licence: str = "unknown"
    base_model: str | None = None
    seed: int = 0
    depth: str = BLOCK_INFLUENCE
    search: Search = dataclasses.field(default_factory=Search)
    cutting: Cutting = dataclasses.field(default_factory=Cutting)

    def as_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        """Raises InputError for a key that does not exist (with the nearest) or a value of another type."""
        return _build(cls, values, "")

    def override(self, settings: Iterable[str]) -> Job:
        """`distillation.tokens=2000`, `keep.ffn=1280`, `layout.tp=3`; raises InputError as `from_dict`."""
        values = self.as_dict()
        for setting in settings:
            key, separator, text = setting.partition("=")
            if not separator:
                raise InputError(f"'{setting}' is no override; write key=value, for example distillation.tokens=2000")
            _set(values, self, key, text)
        return Job.from_dict(values)


def _set(values: dict[str, Any], job: Job, key: str, text: str) -> None:
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        if not isinstance(place.get(parent), dict):
            raise InputError(f"a recipe has no key '{key}'; {nearest(key, keys(job))}")
        place = place[parent]
    if last not in place and parents != ["keep"]:
        raise InputError(f"a recipe has no key '{key}'; {nearest(key, keys(job))}")
    if isinstance(place.get(last), dict):
        raise InputError(f"'{key}' is a group of settings; set one of {', '.join(f'{key}.{k}' for k in place[last])}")
    try:
        place[last] = json.loads(text)
    except ValueError:
        place[last] = text


def keys(job: Job) -> list[str]:
    """Every key that an override may name."""
    found = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else name, inner)
        else:
            found.append(prefix)

    walk("", job.as_dict())
    return found


def _build(cls: Any, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise InputError(f"'{where or 'recipe'}' must be a group of settings, not {values!r}")
    hints = get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        key = f"{where}.{name}" if where else name
        if name not in hints:
            raise InputError(f"a recipe has no key '{key}'; {nearest(name, hints)}")
        kind = hints[name]
        arguments[name] = _build(kind, value, key) if dataclasses.is_dataclass(kind) else _value(kind, value, key)
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in arguments
    ]
    if missing:
        raise InputError(f"the recipe lacks '{where + '.' if where else ''}{missing[0]}'")
    return cls(**arguments)


def _value(kind: Any, value: Any, key: str) -> Any:
    """A plain value of the declared type; int serves as float, a list as a tuple, one value as a list of one."""
    plain = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    name = getattr(kind, "__name__", "")
    if name in plain:
        legal = isinstance(value, plain[name]) and (name == "bool" or not isinstance(value, bool))
        if not legal:
            raise InputError(f"'{key}' is {value!r}; it must be {'an' if name == 'int' else 'a'} {name}")
        return float(value) if name == "float" else value
    if get_origin(kind) is tuple:
        return _sequence(get_args(kind)[0], value, key)
    if isinstance(value, Mapping):
        return dict(value)
    if value is not None and not isinstance(value, str):
        raise InputError(f"'{key}' is {value!r}; it must be a text")
    return value


def _sequence(kind: Any, value: Any, key: str) -> tuple[Any, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_value(kind, item, key) for item in values)
