"""A recipe's value: nested frozen dataclasses of plain values, JSON in and out, overridden by `key=value`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from nemo_minitron.artifacts.files import parse_json
from nemo_minitron.artifacts.parse import WORDS, anything, checked, shown
from nemo_minitron.errors import InputError, nearest, unprintable
from nemo_minitron.search.depth import BLOCK_INFLUENCE
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.cutting import Cutting
from nemo_minitron.settings.distillation import Distillation
from nemo_minitron.settings.generation import Generation
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.search import Search
from nemo_minitron.settings.step import OPEN, Step, check_chain
from nemo_minitron.settings.validated import ValidatedSettings, check_whole


@dataclasses.dataclass(frozen=True)
class Data:
    """Corpora: text, JSONL, a `datasets` name or folder, or a `.bin/.idx` prefix; `calibration` defaults to `train`.

    A `datasets` source is NAME[:CONFIGURATION][@SPLIT], for example `Salesforce/wikitext:wikitext-2-raw-v1@validation`.
    Without @SPLIT `train` and `calibration` are its train split, `test` its test split, never silently another.
    `teachers_own`: it is what the teacher was trained on, so that no teacher correction is called for.
    `skip_bad_lines`: lines that cannot be read are left out and counted; else the first of them is refused.
    """

    train: str
    test: str
    calibration: str | None = None
    name: str = "corpus"
    licence: str = "unknown"
    teachers_own: bool = False
    skip_bad_lines: bool = False


@dataclasses.dataclass(frozen=True)
class Evaluation(ValidatedSettings):
    """Perplexity on `tokens` of the held-out corpus, and greedy continuations of `prompts`.

    `benchmarks` of teacher and student: base, instruct or names of `evaluation.benchmarks`, those that lm-eval has.
    """

    tokens: int = 16_384
    sequence_length: int = 512
    batch_size: int = 4
    precision: str = "bf16"
    random_baseline: bool = True
    prompts: tuple[str, ...] = ()
    new_tokens: int = 48
    benchmarks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Job:
    """The whole job: what `minitron compress` runs. `keep` maps an axis to the size that stays; with a target in
    `search` the other sizes are searched for.

    `teacher_config`: the Hugging Face config that the teacher is expected to have, which the dry run goes by where
    the teacher is not on this machine; a teacher of another architecture is refused.
    `base_model` and `licence` are the teacher's name and licence on the model card. `depth`: by which criterion
    layers go: block_influence, or loss, perplexity, accuracy or removal, which the calibration then gathers too.
    `cutting`: what is solved or folded in place of the plan's slices. `generation`: text that the teacher writes, for
    the student to learn. `rounds`: so many times it is scored and cut in turn, in equal steps from the teacher's sizes
    to the student's, without retraining between (`job/stages/rounds.py`).

    `chain`: steps instead, each of which cuts the student of the one before it and leaves its own in a folder of its
    name; every other setting holds for all of them, but for what a Step sets. `learns_from`: the model that the
    student learns from, where it is not the one that is cut; `lineage`: files of the plans that made the one that is
    cut of it, the first one first.
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
    teacher_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rounds: int = 1
    chain: tuple[Step, ...] = ()
    learns_from: str = ""
    lineage: tuple[str, ...] = ()
    generation: Generation = dataclasses.field(default_factory=Generation)

    def __post_init__(self) -> None:
        if not WORDS.fullmatch(str(self.name)):  # a folder's name, a batch job's, the card's
            raise InputError(f"'name' is {shown(self.name)}; write letters, digits, '.', '_' and '-', a letter first")
        for name in ("rounds", "seed"):
            check_whole(name, getattr(self, name))
        if self.search.wanted and self.rounds != 1:
            raise InputError(f"rounds={self.rounds} needs sizes in keep, and a search finds those of one cut")
        alone = {"keep": bool(self.keep), "search": self.search.wanted, "rounds": self.rounds != 1}
        alone |= {"learns_from": bool(self.learns_from), "lineage": bool(self.lineage)}
        check_chain([step for step in self.chain if isinstance(step, Step)], alone)  # `from_dict` makes them of others

    def as_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        """Raises InputError for a key that does not exist (with the nearest) or a value of another type."""
        return _build(cls, values, "")

    def folder(self, out: str | Path | None = None) -> Path:
        """The run folder: `out`, or runs/NAME."""
        return Path(out or Path("runs") / self.name)

    def override(self, settings: Iterable[str]) -> Job:
        """`distillation.tokens=2000`, `keep.ffn=1280`, `layout.tp=3`, and of a chain's steps, counted from 0,
        `chain.0.keep.ffn=1280` and `chain.1.distillation.tokens=2000`; raises InputError as `from_dict`."""
        values = self.as_dict()
        for setting in settings:
            key, separator, text = setting.partition("=")
            if not separator:
                raise InputError(f"'{setting}' is no override; write key=value, for example distillation.tokens=2000")
            _set(values, self, key, text)
        return Job.from_dict(values)


def _set(values: dict[str, Any], job: Job, key: str, text: str) -> None:
    *parents, last = key.split(".")
    place: Any = values
    for parent in parents:
        if isinstance(place, list) and parent.isdecimal() and int(parent) < len(place):
            place = place[int(parent)]
        elif isinstance(place, dict) and isinstance(place.get(parent), (dict, list)):
            place = place[parent]
        else:
            raise InputError(f"a recipe has no key '{key}'; {nearest(key, keys(job))}")
    if not isinstance(place, dict) or (last not in place and not _open(parents)):
        raise InputError(f"a recipe has no key '{key}'; {nearest(key, keys(job))}")
    if isinstance(place.get(last), dict):
        inside = ", ".join(f"{key}.{name}" for name in place[last] or ["NAME"])
        raise InputError(f"'{key}' is a group of settings; set one of {inside}")
    try:
        place[last] = parse_json(text)
    except ValueError:
        place[last] = text


def _open(parents: list[str]) -> bool:
    """Whether this group takes names that are not in it yet."""
    return parents[-1:] == ["keep"] or (parents[:1] == ["chain"] and parents[2:] in [[name] for name in OPEN])


def keys(job: Job) -> list[str]:
    """Every key that an override may name."""
    found = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else name, inner)
        elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
            walk(prefix, dict(enumerate(value)))
        else:
            found.append(prefix)

    walk("", job.as_dict())
    return found


def _build(cls: Any, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise InputError(f"'{where or 'recipe'}' must be a group of settings, not {shown(values)}")
    hints = get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        key = f"{where}.{name}" if where else name
        if name not in hints:
            raise InputError(f"a recipe has no key '{key}'; {nearest(name, hints)}")
        kind = hints[name]
        arguments[name] = _value(kind, value, key)
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
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, key)
    plain = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    name = getattr(kind, "__name__", "")
    if name in plain:
        legal = isinstance(value, plain[name]) and (name == "bool" or not isinstance(value, bool))
        if not legal:
            raise InputError(f"'{key}' is {shown(value)}; it must be {'an' if name == 'int' else 'a'} {name}")
        return _number(value, key) if name == "float" else _plain(value, key)
    if get_origin(kind) is tuple:
        return _sequence(get_args(kind)[0], value, key)
    if get_origin(kind) is Mapping:
        return _mapping(get_args(kind)[1], value, key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"'{key}' is {shown(value)}; it must be a text")
    return _plain(value, key)


def _mapping(kind: Any, value: Any, key: str) -> dict[str, Any]:
    """Names to values of a kind; of any kind they are plain, and not nested without end."""
    if not isinstance(value, Mapping):
        raise InputError(f"'{key}' must be a group of settings, not {shown(value)}")
    if kind is Any:
        return checked(dict(value), anything(), f"'{key}'")
    found = {}
    for name, item in value.items():  # `keep.layers` may list which ones stay
        each = [_value(kind, one, f"{key}.{name}") for one in (item if isinstance(item, (list, tuple)) else [item])]
        found[_plain(name, key)] = each if isinstance(item, (list, tuple)) else each[0]
    return found


def _plain(value: Any, key: str) -> Any:
    """A text that has no control characters: it may be a path, or be printed. Prompts may have lines."""
    allowed = "\n\t" if key.rpartition(".")[2] == "prompts" else ""
    if isinstance(value, str) and any(unprintable(character) for character in value if character not in allowed):
        raise InputError(f"'{key}' is {shown(value)}; it must be a text without control characters")
    return value


def _number(value: int | float, key: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"'{key}' is a whole number of {int(value).bit_length()} bits; no float is near it") from None


def _sequence(kind: Any, value: Any, key: str) -> tuple[Any, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    items = [f"{key}.{number}" if dataclasses.is_dataclass(kind) else key for number in range(len(values))]
    return tuple(_value(kind, item, where) for item, where in zip(values, items, strict=True))
