"""The `run_config.yaml` of a checkpoint of Megatron-Bridge, read as data.

Bridge would import and call the classes that the file names. Here nothing is imported or called.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from nemo_minitron.artifacts.json_types import Json, JsonFields, JsonObject
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.families import family_of_fields
from nemo_minitron.families.bridge import LLAMA3, hf_yarn

NAME = "run_config.yaml"
LARGEST = 1 << 24  # bytes
TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's: the number of the newest complete checkpoint
GEMMA = "nemo_minitron.hosts.bridge.gemma."
DEEPSEEK = "nemo_minitron.hosts.bridge.deepseek."
PROVIDERS = ("megatron.bridge.models.", "nemo_minitron.hosts.bridge.longrope.", GEMMA, DEEPSEEK)
SPECS = ("megatron.bridge.models.gpt_provider.", "megatron.core.models.gpt.gpt_layer_specs.", GEMMA, DEEPSEEK)
# Fields of Bridge's that no family of this package has, with the only value that they may have here.
FIXED: JsonObject = {
    "attention_output_gate": False, "apply_residual_connection_post_layernorm": False,
    "heterogeneous_block_specs": False, "is_hybrid_model": False, "mtp_num_layers": None,
    "multi_latent_attention": False, "qk_l2_norm": False,
    "experimental_attention_variant": None,
}  # fmt: skip
OF_LATENTS: JsonObject = FIXED | {"multi_latent_attention": True}
OF_HYBRIDS: JsonObject = FIXED | {"is_hybrid_model": True, "mtp_num_layers": 0}


def name_of(step: int) -> str:
    """The folder of the checkpoint after so many steps."""
    return f"iter_{step:07d}"


def is_bridge_checkpoint(path: str | Path) -> bool:
    """Whether a folder is a checkpoint of Bridge, or a folder of several with its tracker."""
    return (Path(path) / NAME).is_file() or (Path(path) / TRACKER).is_file()


def newest(path: Path) -> Path:
    """The checkpoint itself: `path`, or the one in it that the tracker names. Raises InputError if that is missing."""
    if (path / NAME).is_file():
        return path
    try:
        checkpoint = path / name_of(int((path / TRACKER).read_text()))
    except (OSError, ValueError):
        raise InputError(f"'{path / TRACKER}' names no checkpoint; it must hold the number of steps") from None
    if not (checkpoint / NAME).is_file():
        raise InputError(f"'{path / TRACKER}' names '{checkpoint}', which is no checkpoint of Megatron-Bridge")
    return checkpoint


def run_config(checkpoint: str | Path) -> JsonObject:
    """The values of a checkpoint's run_config.yaml. Raises InputError if it is missing or damaged."""
    file = Path(checkpoint) / NAME
    try:
        if file.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        values = yaml.safe_load(file.read_text())
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            raise ValueError("it has no model")
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"'{file}' is no config of Megatron-Bridge: {first_line(error)}") from None
    return values


def hf_config(checkpoint: str | Path) -> JsonObject:
    """The Hugging Face config that corresponds to the model of a checkpoint.

    Bridge does not keep the longest sequence of a model: `max_position_embeddings` is the training's sequence length.
    Raises InputError as `run_config`, and for a model that no family of this package is.
    """
    try:
        return config_of_model(run_config(checkpoint)["model"])
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"'{checkpoint}' has no model of Bridge's: {type(error).__name__} {error}") from None


def config_of_model(model: JsonFields) -> JsonObject:
    """The Hugging Face config of a model's part of a run config. Raises InputError as `hf_config`."""
    provider, spec = _target(model), _target(model.get("transformer_layer_spec") or model.get("hybrid_stack_spec"))
    if not str(provider).startswith(PROVIDERS) or not (spec is None or str(spec).startswith(SPECS)):
        raise InputError(f"the checkpoint's model is a {provider} with the layers of {spec}, which is not supported")
    fixed = OF_HYBRIDS if model.get("hybrid_layer_pattern") else FIXED
    for name, value in (OF_LATENTS if str(provider).startswith(DEEPSEEK) else fixed).items():
        if model.get(name, value) != value:
            raise InputError(f"the checkpoint's {name} is {model[name]!r}; only {value!r} is supported")
    fields = {name: _plain(value) for name, value in model.items()}
    fields.setdefault("max_position_embeddings", fields["seq_length"])  # a field of some of NeMo's classes
    if fields.get("rope_scaling"):
        fields |= dict(LLAMA3) | {"scale_factor": fields["rope_scaling_factor"]}
    scaling = hf_yarn(fields)
    plain = fields | {"position_embedding_type": "rope"} if scaling else fields
    family = family_of_fields(plain)
    return family.from_nemo(plain) | scaling


def _target(value: Json) -> Json:
    return value.get("_target_") if isinstance(value, dict) else value


def _plain(value: Json) -> Json:
    """A function is given by its dotted name."""
    return _target(value) if isinstance(value, dict) and not value.get("_call_") else value
