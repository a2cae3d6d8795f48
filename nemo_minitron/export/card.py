"""The model card: what was cut, how, with which data, what it scores, and the command that made it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.files import atomic_file
from nemo_minitron.artifacts.json_types import JsonFields, JsonObject
from nemo_minitron.errors import InputError, visible
from nemo_minitron.export import formatting

DTYPES = ("bfloat16", "float16", "float32")
NOTHING = ("", "~", "null", "Null", "NULL")  # spellings of nothing in YAML
LARGEST_FRONT = 1 << 20  # most characters of a card that are read
MARKS = {mark: f"\\{mark}" for mark in "\\`[]|"} | {
    "<": "&lt;",
    ">": "&gt;",
    "&": "&amp;",
}  # characters with a meaning in Markdown or HTML
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
LINK = re.compile(r"(https://)?[\w./~%+-]+", re.ASCII)  # a link to a licence, or to its file beside the card
TEMPLATE = Path(__file__).with_name("card.md.jinja")
DATA_KEYS = ("name", "license", "use")
DISTILLATION_KEYS = ("loss", "tokens", "steps", "precision", "learning_rate")
NUMBER_KEYS = ("stage", "corpus", "tokens", "parameters", "loss", "perplexity", "bits_per_byte")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardFacts:
    """The content of a card: two Architectures and plain values.

    `base_model`: hub id or name; `base_folder`: its folder, whose card's licence takes precedence over
    `license` (an identifier such as apache-2.0). `samples`, `tokens`: of the calibration. `data`: rows of
    {"name", "license", "use"}; `distillation`: {"loss", "tokens", "steps", "precision", "learning_rate"} or
    None; `numbers`: rows of numbers.json; `command`: the command that made the model; `versions`: package -> version;
    `limits`: more sentences about limits; `in_place`: weights that are not slices of the base's. `base_note`: what the
    base was exactly; `dtype`: of the stored weights, as torch names it; `chats`: whether the tokenizer has a chat
    template; `figures`: title -> the name of an image beside the card. Without a `criterion` the card says nothing
    about scores.

    Raises InputError if a row lacks one of these keys.
    """

    name: str
    base_model: str
    source: Architecture
    target: Architecture
    command: str
    criterion: str = ""
    samples: int = 0
    tokens: int = 0
    plan_digest: str = ""
    license: str | None = None
    base_folder: str | Path | None = None
    language: str | None = "en"
    data: Sequence[JsonFields] = ()
    distillation: JsonFields | None = None
    numbers: Sequence[JsonFields] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limits: Sequence[str] = ()
    in_place: str = ""
    base_note: str = ""
    dtype: str = "bfloat16"
    chats: bool = False
    figures: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("data", self.data, DATA_KEYS)
        _check("numbers", self.numbers, NUMBER_KEYS)
        if self.distillation is not None:
            _check("distillation", [self.distillation], DISTILLATION_KEYS)


def _check(what: str, rows: Sequence[JsonFields], keys: Sequence[str]) -> None:
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

    fields: JsonObject = {
        "base_model": visible(_line(facts.base_model)),
        "language": facts.language,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nemo", "minitron", "pruning", *(["distillation"] if facts.distillation else [])],
        **license_of(facts),
    }
    front = ModelCardData(**fields)
    card = ModelCard.from_template(front, template_str=TEMPLATE.read_text(encoding="utf-8"), **_template_values(facts))
    return str(card).rstrip() + "\n"


def license_of(facts: CardFacts) -> dict[str, str]:
    """`license` of the base's card (with name and link if it has them), else of `facts`; may be empty."""
    fields = ("license", "license_name", "license_link")
    front = _front_matter(Path(facts.base_folder) / "README.md") if facts.base_folder else {}
    stated = {name: front[name] for name in fields if isinstance(front.get(name), str) and front[name] not in NOTHING}
    if not LINK.fullmatch(stated.get("license_link", "https://x")):
        del stated["license_link"]
    if "license" in stated:
        return {name: visible(_line(value)) for name, value in stated.items()}
    return {"license": visible(_line(facts.license))} if facts.license else {}


def _front_matter(card: Path) -> JsonObject:
    """The YAML front matter of a card; empty if it is missing or damaged: a faulty card must not stop an export.

    Every value stays a text, so that an odd date or number in it does no harm.
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


def _template_values(facts: CardFacts) -> JsonObject:
    """The values that the template prints, as texts that cannot break a Markdown table."""
    parameters = facts.source.parameters(), facts.target.parameters()
    smallest = min((row["tokens"] for row in facts.numbers), default=0)
    return {
        "name": _cell(facts.name),
        "base": _cell(facts.base_model),
        "on_hub": HUB_ID.fullmatch(facts.base_model) is not None,
        "loaded": json.dumps(visible(_line(facts.name)), ensure_ascii=False).replace("<", "\\u003c"),
        "licence": _cell(license_of(facts).get("license", "not stated")),
        "before": formatting.short_count(parameters[0]),
        "after": formatting.short_count(parameters[1]),
        "after_exact": formatting.count(parameters[1]),
        "change": formatting.change(*parameters) or "±0 %",
        "sizes": formatting.size_rows(facts.source, facts.target),
        "criterion": _cell(facts.criterion),
        "samples": formatting.count(facts.samples),
        "calibration_tokens": formatting.count(facts.tokens),
        "plan_digest": _cell(facts.plan_digest),
        "data": [[_cell(row[key]) for key in DATA_KEYS] for row in facts.data],
        "distillation": _distillation(facts.distillation),
        "numbers": number_rows(facts.numbers),
        "evaluated": formatting.count(smallest) if smallest else "",
        "command": _command(facts.command),
        "fence": "`" * max(3, 1 + max(map(len, re.findall("`+", facts.command)), default=0)),
        "versions": [(_cell(k), _cell(v)) for k, v in sorted(facts.versions.items())],
        "limits": [_cell(sentence) for sentence in facts.limits],
        "in_place": _cell(facts.in_place),
        "base_note": _cell(facts.base_note),
        "dtype": facts.dtype if facts.dtype in DTYPES else "auto",
        "chats": facts.chats,
        "hybrid": bool(facts.target.hybrid_pattern),
        "capped": facts.target.capped_attention,  # transformers' default attention leaves the cap out
        "rescaled": facts.source.scaled_embeddings and facts.source.hidden_size != facts.target.hidden_size,
        "figures": {_cell(title): quote(name) for title, name in facts.figures.items()},
    }


def _command(command: str) -> str:
    """The lines of the command, without characters that a terminal would act on after a copy."""
    return "\n".join(map(visible, command.strip().split("\n")))


def _distillation(values: JsonFields | None) -> dict[str, str] | None:
    if values is None:
        return None
    counted = {key: formatting.count(values[key]) for key in ("tokens", "steps")}
    return {key: counted.get(key, _cell(values[key])) for key in DISTILLATION_KEYS}


def number_rows(numbers: Sequence[JsonFields]) -> list[list[str]]:
    """The rows of numbers.json as texts, by corpus and then teacher first."""
    ordered = sorted(numbers, key=lambda row: (row["corpus"], formatting.stage_order(row["stage"])))
    return [
        [
            _cell(formatting.STAGES.get(row["stage"], row["stage"])),
            _cell(row["corpus"]),
            *formatting.result_cells(row),
        ]
        for row in ordered
    ]


def _line(value: object) -> str:
    """The value on one line: a line of dashes inside a value would end the front matter."""
    return " ".join(str(value).split())


def _cell(value: object) -> str:
    """The value as one line of plain Markdown text: it cannot become a link, image, tag, code or column."""
    return "".join(MARKS.get(character, character) for character in visible(_line(value)))
