"""A recipe as a value: nested frozen dataclasses of plain values, read and written as JSON, changed by `key=value`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.blocks import BLOCK_INFLUENCE
from nemo_minitron.artifacts.files import parse_json
from nemo_minitron.artifacts.json_types import JsonFields, JsonObject
from nemo_minitron.artifacts.parse import WORDS, shown
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.schema import ANY_MODEL, asked_for, known_as, seed_setting, setting
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.cutting import Cutting
from nemo_minitron.settings.distillation import Distillation
from nemo_minitron.settings.evaluation import CARD, Data, Evaluation
from nemo_minitron.settings.gates import Gates
from nemo_minitron.settings.generation import Generation
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.plain import build
from nemo_minitron.settings.search import Search
from nemo_minitron.settings.step import OPEN, Step, check_chain
from nemo_minitron.settings.validated import ValidatedSettings

ALONE = "only a job has this setting"
GIVEN = "commands take their model as an argument"
PLAN = "minitron plan has an option of this name"
KEEP = (
    "Axis -> the size to keep; for layers also a list, [0, 1, 3] or 0+1+3-7. Beside a search: axes that are held fixed."
)
EXPECTED = "Hugging Face config that the teacher must have; a dry run needs no more than this."


@dataclasses.dataclass(frozen=True)
class Job(ValidatedSettings):
    """The whole job: what `minitron compress` runs. `keep` maps an axis to the size to keep. With a target in `search`,
    the other sizes are searched for.

    `teacher_config`: the dry run reads it if the teacher is not on this machine; a teacher of another architecture is
    refused. `depth`: block_influence, or loss, perplexity, accuracy or removal, which the calibration then also
    gathers. `cutting`: which matrices are re-fitted or scaled instead of sliced. `generation`: text that the teacher
    writes for the student to learn. `gates`: checks of the cut. Between `rounds` there is no
    retraining (`job/stages/rounds.py`).

    `chain`: each step leaves its student in a folder of its own. Every other setting holds for all steps, except what a
    Step sets. Raises InputError for a value that is not legal.
    """

    name: str = dataclasses.field(metadata=known_as("Name of the job, and of its folder in runs/.", recipe_only=ALONE))
    teacher: str = dataclasses.field(metadata=known_as(f"{ANY_MODEL}.", recipe_only=GIVEN))
    data: Data
    keep: Mapping[str, int] = dataclasses.field(default_factory=dict, metadata=known_as(KEEP, recipe_only=PLAN))
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    distillation: Distillation = dataclasses.field(default_factory=Distillation)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    layout: Layout = dataclasses.field(default_factory=Layout)
    licence: str = setting("unknown", "Licence of the teacher, on the model card.", recipe_only=CARD)
    base_model: str | None = setting(None, "The teacher's name on the model card.", recipe_only=CARD)
    base_note: str = setting(
        "", "What the teacher was exactly, if it is not the published model, for the card.", recipe_only=CARD
    )
    seed: int = seed_setting(0, "The seed of the student that is cut at random, for comparison.", recipe_only=ALONE)
    depth: str = setting(BLOCK_INFLUENCE, "The criterion that chooses which layers are dropped.", recipe_only=PLAN)
    search: Search = dataclasses.field(default_factory=Search)
    cutting: Cutting = dataclasses.field(default_factory=Cutting)
    teacher_config: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, metadata=known_as(EXPECTED, recipe_only=ALONE)
    )
    rounds: int = setting(
        1, "Number of times that the model is scored and cut in turn, in equal steps.", recipe_only=ALONE
    )
    chain: tuple[Step, ...] = setting(
        (), "Steps, each of which cuts the student of the step before.", recipe_only=ALONE
    )
    learns_from: str = setting("", "The model that the student learns from. Default: the teacher.", recipe_only=ALONE)
    lineage: tuple[str, ...] = setting(
        (), "Files of the plans that made the teacher from learns_from, the first one first.", recipe_only=ALONE
    )
    generation: Generation = dataclasses.field(default_factory=Generation)
    gates: Gates = dataclasses.field(default_factory=Gates)

    def __post_init__(self) -> None:
        if not WORDS.fullmatch(str(self.name)):  # it names a folder, a batch job and the model card
            raise InputError(f"'name' is {shown(self.name)}; write letters, digits, '.', '_' and '-', a letter first")
        super().__post_init__()
        if self.search.wanted and self.rounds != 1:
            raise InputError(f"rounds={self.rounds} needs sizes in keep; a search finds the sizes of a single cut")
        alone = {"keep": bool(self.keep), "search": self.search.wanted, "rounds": self.rounds != 1}
        alone |= {"learns_from": bool(self.learns_from), "lineage": bool(self.lineage)}
        # A Python recipe may give plain values for a step; `from_dict` makes a Step of them, and checks it then.
        check_chain([step for step in self.chain if isinstance(step, Step)], alone)

    def as_dict(self) -> JsonObject:
        """Plain values, as in JSON. A default that can be derived keeps its class (`Unasked`)."""
        return _with_marks(json.loads(json.dumps(dataclasses.asdict(self))), self)

    @classmethod
    def from_dict(cls, values: JsonFields) -> Job:
        """A job from plain values. Raises InputError for an unknown key (with the nearest), a value of another type."""
        return build(cls, values)

    def folder(self, out: str | Path | None = None) -> Path:
        """The run folder: `out`, or runs/NAME."""
        return Path(out or Path("runs") / self.name)

    def override(self, settings: Iterable[str]) -> Job:
        """The job with other settings: `distillation.tokens=2000`, `keep.ffn=1280`, `layout.tp=3`. In a chain, steps
        count from 0: `chain.0.keep.ffn=1280`, `chain.1.distillation.tokens=2000`. Raises InputError as `from_dict`."""
        values = self.as_dict()
        for override in settings:
            key, separator, text = override.partition("=")
            if not separator:
                raise InputError(f"'{override}' sets nothing; write key=value, for example distillation.tokens=2000")
            _set(values, self, key, text)
        return Job.from_dict(values)


def _with_marks(values: JsonObject, group: Any) -> JsonObject:
    """`values` of a group of settings, with its `Unasked` numbers instead of plain ones."""
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            _with_marks(values[field.name], value)
        elif not asked_for(value):
            values[field.name] = value
    return values


def with_defaults_unasked(group: Any) -> Any:
    """The settings of a file that writes all of them out: a size at its default counts as not asked for."""
    changed = {}
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = with_defaults_unasked(value)
        elif not asked_for(field.default) and value == field.default:
            changed[field.name] = field.default
    return dataclasses.replace(group, **changed)


def _set(values: JsonObject, job: Job, key: str, text: str) -> None:
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
    """Whether this group takes names that it does not have yet."""
    return parents[-1:] == ["keep"] or (parents[:1] == ["chain"] and parents[2:] in [[name] for name in OPEN])


def keys(job: Job) -> list[str]:
    """Every key that an override may name."""
    names = []

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else name, inner)
        elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
            walk(prefix, dict(enumerate(value)))
        else:
            names.append(prefix)

    walk("", job.as_dict())
    return names
