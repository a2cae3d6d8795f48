"""The model card: what was cut, how, with which data, what it scores, and the command that made it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.files import atomic_file
from nemo_minitron.errors import InputError, visible
from nemo_minitron.export import words

NOTHING = ("", "~", "null", "Null", "NULL")  # as YAML writes it
LARGEST_FRONT = 1 << 20  # characters of a card that are read
MARKS = {mark: f"\\{mark}" for mark in "\\`[]|"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}  # Markdown's, and HTML's
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
LINK = re.compile(r"(https://)?[\w./~%+-]+", re.ASCII)  # to a licence, or its file beside the card
TEMPLATE = Path(__file__).with_name("card.md.jinja")
DATA_KEYS = ("name", "license", "use")
DISTILLATION_KEYS = ("loss", "tokens", "steps", "precision", "learning_rate")
NUMBER_KEYS = ("stage", "corpus", "tokens", "parameters", "loss", "perplexity", "bits_per_byte")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card says; plain values beside the two Architectures.

    `base_model`: hub id or name; `base_folder`: where its own card may lie, whose licence goes before
    `license` (an identifier such as apache-2.0). `samples`, `tokens`: of the calibration. `data`: rows of
    {"name", "license", "use"}; `distillation`: {"loss", "tokens", "steps", "precision", "learning_rate"} or
    None; `numbers`: rows of numbers.json; `command`: what made the model; `versions`: package -> version;
    `limits`: sentences of the caller's own; `in_place`: what the student got in place of the plan's slices.

    Raises InputError for a row that lacks one of these.
    """

    name: str
    base_model: str
    source: Architecture
    target: Architecture
    criterion: str
    samples: int
    tokens: int
    plan_digest: str
    command: str
    license: str | None = None
    base_folder: str | Path | None = None
    language: str | None = "en"
    data: Sequence[Mapping[str, Any]] = ()
    distillation: Mapping[str, Any] | None = None
    numbers: Sequence[Mapping[str, Any]] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limits: Sequence[str] = ()
    in_place: str = ""

    def __post_init__(self) -> None:
        _check("data", self.data, DATA_KEYS)
        _check("numbers", self.numbers, NUMBER_KEYS)
        if self.distillation is not None:
            _check("distillation", [self.distillation], DISTILLATION_KEYS)


def _check(what: str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    for row in rows:
        missing = [key for key in keys if key not in row]
        if missing:
            raise InputError(f"the card's {what} needs {', '.join(keys)}; a row lacks '{missing[0]}'")


def write_card(folder: str | Path, facts: CardFacts) -> Path:
    """Writes `folder`/README.md and returns its path."""
    with atomic_file(Path(folder) / "README.md") as temporary:
        temporary.write_text(card_text(facts), encoding="utf-8")
    return Path(folder) / "README.md"


def card_text(facts: CardFacts) -> str:
    """The whole card: YAML front matter and Markdown."""
    from huggingface_hub import ModelCard, ModelCardData

    fields: dict[str, Any] = {
        "base_model": visible(_line(facts.base_model)),
        "language": facts.language,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nemo", "minitron", "pruning", *(["distillation"] if facts.distillation else [])],
        **license_of(facts),
    }
    front = ModelCardData(**fields)
    card = ModelCard.from_template(front, template_str=TEMPLATE.read_text(encoding="utf-8"), **_words(facts))
    return str(card).rstrip() + "\n"


def license_of(facts: CardFacts) -> dict[str, str]:
    """`license` of the base's card (with name and link if it has them), else the caller's; may be empty."""
    fields = ("license", "license_name", "license_link")
    front = _front_matter(Path(facts.base_folder) / "README.md") if facts.base_folder else {}
    said = {name: front[name] for name in fields if isinstance(front.get(name), str) and front[name] not in NOTHING}
    if not LINK.fullmatch(said.get("license_link", "https://x")):
        del said["license_link"]
    if "license" in said:
        return {name: visible(_line(value)) for name, value in said.items()}
    return {"license": visible(_line(facts.license))} if facts.license else {}


def _front_matter(card: Path) -> dict[str, Any]:
    """Empty for a card that is missing or has none: a base's faulty card must not stop an export.

    Every value stays the text that it is: a date that is none, or an octal number, is nobody's concern here.
    """
    import yaml

    if not card.is_file():
        return {}
    with open(card, encoding="utf-8", errors="replace") as file:
        parts = file.read(LARGEST_FRONT).split("---\n", 2)
    try:
        values = yaml.load(parts[1], yaml.BaseLoader) if len(parts) == 3 and not parts[0].strip() else {}
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _words(facts: CardFacts) -> dict[str, Any]:
    """Everything the template prints, as words that cannot break a Markdown table."""
    parameters = facts.source.parameters(), facts.target.parameters()
    smallest = min((row["tokens"] for row in facts.numbers), default=0)
    return {
        "name": _cell(facts.name),
        "base": _cell(facts.base_model),
        "on_hub": HUB_ID.fullmatch(facts.base_model) is not None,
        "loaded": json.dumps(visible(_line(facts.name)), ensure_ascii=False).replace("<", "\\u003c"),
        "licence": _cell(license_of(facts).get("license", "not stated")),
        "before": words.short_count(parameters[0]),
        "after": words.short_count(parameters[1]),
        "after_exact": words.count(parameters[1]),
        "change": words.change(*parameters) or "±0 %",
        "sizes": words.size_rows(facts.source, facts.target),
        "criterion": _cell(facts.criterion),
        "samples": words.count(facts.samples),
        "calibration_tokens": words.count(facts.tokens),
        "plan_digest": _cell(facts.plan_digest),
        "data": [[_cell(row[key]) for key in DATA_KEYS] for row in facts.data],
        "distillation": _distillation(facts.distillation),
        "numbers": number_rows(facts.numbers),
        "evaluated": words.count(smallest) if smallest else "",
        "command": _command(facts.command),
        "fence": "`" * max(3, 1 + max(map(len, re.findall("`+", facts.command)), default=0)),
        "versions": [(_cell(k), _cell(v)) for k, v in sorted(facts.versions.items())],
        "limits": [_cell(sentence) for sentence in facts.limits],
        "in_place": _cell(facts.in_place),
    }


def _command(command: str) -> str:
    """Lines as they are, without characters that a terminal would act on once they are copied there."""
    return "\n".join(map(visible, command.strip().split("\n")))


def _distillation(values: Mapping[str, Any] | None) -> dict[str, str] | None:
    if values is None:
        return None
    counted = {key: words.count(values[key]) for key in ("tokens", "steps")}
    return {key: counted.get(key, _cell(values[key])) for key in DISTILLATION_KEYS}


def number_rows(numbers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of numbers.json, by corpus and then teacher first, as words."""
    ordered = sorted(numbers, key=lambda row: (row["corpus"], words.stage_order(row["stage"])))
    return [
        [
            _cell(words.STAGES.get(row["stage"], row["stage"])),
            _cell(row["corpus"]),
            words.count(row["parameters"]),
            words.number(row["loss"]),
            words.number(row["perplexity"], 2),
            words.number(row["bits_per_byte"]),
            words.count(row["tokens"]),
        ]
        for row in ordered
    ]


def _line(value: Any) -> str:
    """One line: a line of dashes inside a value would end the front matter."""
    return " ".join(str(value).split())


def _cell(value: Any) -> str:
    """One line of text in Markdown: no link, image, tag, code or column comes of what it holds."""
    return "".join(MARKS.get(character, character) for character in visible(_line(value)))
