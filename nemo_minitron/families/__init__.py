"""Model families, one small file each; this file finds the family of a config, and the folder of a model.

No torch: configs are dicts, names are strings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_minitron import hybrid
from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.files import read_json
from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.artifacts.parse import anything, mapped
from nemo_minitron.errors import InputError
from nemo_minitron.families.arcee import Arcee
from nemo_minitron.families.base import Family
from nemo_minitron.families.bridge import bridge_fields
from nemo_minitron.families.deepseek_v2 import DeepseekV2
from nemo_minitron.families.deepseek_v3 import DeepseekV3
from nemo_minitron.families.forms import normalized
from nemo_minitron.families.gemma2 import Gemma2
from nemo_minitron.families.gemma3 import Gemma3
from nemo_minitron.families.gpt_oss import GptOss
from nemo_minitron.families.granite import Granite
from nemo_minitron.families.llama import Llama
from nemo_minitron.families.ministral import Ministral
from nemo_minitron.families.mistral import Mistral
from nemo_minitron.families.mixtral import Mixtral
from nemo_minitron.families.nemotron import Nemotron
from nemo_minitron.families.nemotron_h import NemotronH
from nemo_minitron.families.phi3 import Phi3
from nemo_minitron.families.qwen2 import Qwen2
from nemo_minitron.families.qwen2_moe import Qwen2Moe
from nemo_minitron.families.qwen3 import Qwen3
from nemo_minitron.families.qwen3_moe import Qwen3Moe
from nemo_minitron.families.seed_oss import SeedOss
from nemo_minitron.families.side_files import without_code
from nemo_minitron.families.smollm3 import SmolLM3

# The files that are taken from a hub repository; a pickle is never among them.
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
FAMILIES: tuple[Family, ...] = (
    Llama(),
    Mistral(),
    Ministral(),
    Mixtral(),
    Qwen2(),
    Qwen3(),
    Qwen3Moe(),
    Qwen2Moe(),
    Nemotron(),
    Phi3(),
    SmolLM3(),
    Arcee(),
    SeedOss(),
    Granite(),
    GptOss(),
    Gemma2(),
    Gemma3(),
    NemotronH(),
    DeepseekV2(),
    DeepseekV3(),
)

# A class that also reads pictures -> the class of its text, which `minitron convert` makes a folder of.
PICTURES: Mapping[str, str] = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}


def family_of(config: HfConfig) -> Family:
    """The family of a Hugging Face config. Raises InputError for one that is not supported."""
    classes = config.get("architectures") or []
    kind = config.get("model_type")
    if not isinstance(classes, list):
        raise InputError(f"the config's 'architectures' is {classes!r}; it must be a list of class names")
    for family in FAMILIES:
        if family.hf_class in classes or (not classes and family.model_type == kind):
            return family
    given = classes[0] if classes else kind
    if text := PICTURES.get(str(given)):
        raise InputError(
            f"a '{given}' reads pictures, too, and only text is supported; `minitron convert MODEL FOLDER` makes a "
            f"folder of its text, a {text}"
        )
    raise InputError(
        f"models of class '{given}' are not supported; supported are: {', '.join(f.hf_class for f in FAMILIES)}"
    )


def family_of_nemo(model_class: str, fields: JsonFields) -> Family:
    """The family whose NeMo class has this name; `fields` (of its config) decide where several families share a class.

    Raises InputError for a class that is not supported, and for one that NeMo builds wrong."""
    built = [family for family in FAMILIES if "nemo" in family.hosts]
    of_class = [family for family in built if family.nemo_model == model_class]
    for family in of_class:
        if family.claims(fields):
            return family
    if of_class:
        return of_class[0]
    classes = ", ".join(dict.fromkeys(family.nemo_model for family in built))
    raise InputError(
        f"NeMo checkpoints of '{model_class}' are not read; read are those of {classes}; of another model give the "
        "Hugging Face folder"
    )


def family_of_fields(fields: JsonFields) -> Family:
    """The first family that can represent a Megatron model with these fields, where no class is named.

    Llama is the first one: whatever it can represent is a Llama. Raises InputError if none can."""
    for family in FAMILIES:
        with contextlib.suppress(InputError):
            if family.claims(fields) and family.architecture(family.from_nemo(fields)):
                return family
    raise InputError(
        "no supported family has a model with these fields of Megatron; supported are: "
        f"{', '.join(family.hf_class for family in FAMILIES)}"
    )


def read_config(model: str | Path | HfConfig) -> JsonObject:
    """The config of a Hugging Face folder, or the given config, in the form of transformers 4 (`forms.normalized`).

    Raises InputError if the folder is no model folder, or the config contradicts itself.
    """
    if isinstance(model, Mapping):
        return normalized(model)
    return normalized(read_json_config(Path(model)))


def read_json_config(folder: Path) -> JsonObject:
    """The config.json of a Hugging Face folder, as it is. Raises InputError if the folder is no model folder."""
    if not folder.exists():
        raise InputError(f"the model folder '{folder}' does not exist")
    if not (folder / "config.json").is_file():
        raise InputError(f"'{folder}' has no config.json, so it is no Hugging Face model folder")
    return read_json(folder / "config.json", "the model's config", mapped(anything()))


def from_hf(model: str | Path | HfConfig) -> Architecture:
    """Architecture of a Hugging Face folder or config dict. Raises InputError as `family_of` does."""
    config = read_config(model)
    return family_of(config).architecture(config)


def check_draft(target: str | Path | HfConfig, draft: str | Path | HfConfig) -> tuple[Architecture, Architecture]:
    """The Architectures of a target model and its draft (speculative decoding). Raises InputError if their vocabularies
    differ."""
    theirs, ours = from_hf(target), from_hf(draft)
    if theirs.vocab_size != ours.vocab_size:
        raise InputError(
            f"the target has {theirs.vocab_size} tokens in its vocabulary, the draft {ours.vocab_size}; they must agree"
        )
    return theirs, ours


def to_hf(architecture: Architecture, base_config: HfConfig, layers: Sequence[int] | None = None) -> JsonObject:
    """`base_config`, normalized, with the sizes of `architecture`; `layers`: the layers of the base that stay, if
    known.

    Raises InputError if the family's config cannot represent the architecture.
    """
    return family_of(base_config).config(architecture, normalized(base_config), layers)


def written_config(config: HfConfig) -> JsonObject:
    """The config for a student's config.json: transformers 4 and 5 read the same model from it, and it refers to no
    code."""
    return family_of(config).written(normalized(without_code(config)))


def multiples_of(config: HfConfig) -> Mapping[str, int | str]:
    """Field of an Architecture -> a number, or another field, that it must be a multiple of, so that every version of
    transformers loads the student."""
    return family_of(config).loads(config)


def remark_on(architecture: Architecture, config: HfConfig) -> str | None:
    """One sentence if some version of transformers cannot load a model of these sizes and this family; else None."""
    return family_of(config).remark(architecture)


def unserved(config: HfConfig) -> dict[str, str]:
    """Engine of `minitron serving` -> why it does not run a model of this config, for those that do not."""
    return family_of(config).unserved(config)


def check_stage(model: str | Path | HfConfig, stage: str) -> Architecture:
    """The model's Architecture. Raises InputError, as `from_hf` does, and if models of its kind do not have the
    stage."""
    architecture = from_hf(model)
    hybrid.check_stage(architecture.hybrid_pattern, stage)
    return architecture


def check_host(model: str | Path | HfConfig, host: str) -> None:
    """Raises InputError, before anything is loaded, if the host's class of the family cannot represent the model.

    `host`: "nemo" or "bridge"."""
    config = read_config(model)
    family = family_of(config)
    if host == "bridge":
        bridge_fields(family, config)
    else:
        family.nemo_config(config)


def megatron_fields(config: HfConfig) -> tuple[str, JsonObject]:
    """What says to Megatron which model a config is, the same on either host: NeMo's class and its fields; of a model
    that NeMo's classes lack, Megatron-Bridge's fields. Raises InputError if neither host can represent it."""
    family = family_of(config)
    try:
        return family.nemo_config(config)
    except InputError:
        return "", bridge_fields(family, config)


def remarks(model: str | Path | HfConfig) -> list[str]:
    """Remarks on a model's config for the user, one sentence each: it names the keys that nothing reads."""
    config = read_config(model)
    unread = family_of(config).unread(config)
    return [f"keys of the config that neither transformers nor this package reads: {', '.join(unread)}"] * bool(unread)


DEMO = " (`make venv`, in a clone of the repository, makes the demo's model)"


def resolve(model: str | Path) -> Path:
    """The folder of a model; a hub id (`org/name`) is looked up in huggingface_hub's cache or, if online, on the
    hub."""
    path = Path(model)
    if path.exists() or not _is_hub_id(str(model)):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=WANTED))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        raise InputError(
            f"'{model}' is neither a folder here nor a model that the hub or its cache gives; give a Hugging Face "
            f"folder, a hub id, or a checkpoint of NeMo or Megatron-Bridge{DEMO * str(model).startswith('demo/')}"
        ) from None


def on_disk(model: str | Path) -> Path | None:
    """The folder of a model on this machine: its own, or the hub's cache if the config is there; else None."""
    path = Path(model)
    if path.exists() or not _is_hub_id(str(model)):
        return path if path.exists() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(str(model), "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _is_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith("/")
