"""Loads a Hugging Face folder as a transformers model: offline, from safetensors only, without remote code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.artifacts.json_types import HfConfig
from nemo_minitron.errors import InputError, first_line, nearest
from nemo_minitron.families import check_stage, family_of, read_config

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def load(folder: str | Path, precision: str = "bf16") -> PreTrainedModel:
    """The model of `folder` in eval mode, on the GPU if there is one.

    Raises InputError for an unknown precision, a folder that is no model, and a missing weight, which transformers
    would fill with random numbers after a mere warning.
    """
    dtype = dtype_name(precision)
    architecture = check_stage(folder, "evaluate")  # refuses, too, a folder that is not of a supported family
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config_object(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **_dtype(getattr(torch, dtype)),
            **_attention(folder),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"transformers cannot load the model '{folder}': {first_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys"):
        if info[problem]:
            kind = problem.removesuffix("_keys")
            raise InputError(f"the model '{folder}' has {kind} weights, such as '{min(info[problem])}'")
    if precision == "fp32":
        model = model.float()  # transformers makes bf16 of MXFP4, whatever it is asked for
    if architecture.hybrid_pattern:
        from nemo_minitron.evaluation.mamba import mend

        mend(model)
    elif architecture.kv_lora_rank:
        from nemo_minitron.evaluation import latents

        latents.mend(model, read_config(folder))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def check_loads(model: str | Path | HfConfig, stage: str) -> None:
    """Raises InputError, before anything is loaded, for a model that does not have this stage, and for a hybrid that
    the installed transformers does not know."""
    if check_stage(model, stage).hybrid_pattern:
        _class_of(read_config(model)["model_type"])


def config_object(model: str | Path | HfConfig) -> PretrainedConfig:
    """transformers' config of a folder or of a config, whichever version of transformers wrote it.

    transformers 4 ignores the keys of transformers 5, so `from_pretrained` alone would use the wrong rotary base.
    """
    config = read_config(model)
    kind = config["model_type"]
    if kind == "mistral" and "layer_types" in config:  # as transformers' AutoConfig does
        kind = "ministral"
    return _class_of(kind).from_dict(_floats(config) | {"model_type": kind})


def _class_of(kind: str) -> type[PretrainedConfig]:
    """transformers' class of configs. Raises InputError if the installed transformers has none."""
    import transformers
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        raise InputError(f"transformers {transformers.__version__} has no '{kind}'; transformers 5 has it")
    return CONFIG_MAPPING[kind]


def _floats(value: Any) -> Any:
    """JSON has no infinity; transformers 5 writes {"__float__": "Infinity"} in its place."""
    if isinstance(value, Mapping):
        given = value.get("__float__")
        return float(given) if len(value) == 1 and given else {name: _floats(item) for name, item in value.items()}
    return [_floats(item) for item in value] if isinstance(value, list) else value


def dtype_name(precision: str) -> str:
    """torch's name of a precision. Raises InputError for an unknown precision."""
    if precision not in DTYPES:
        raise InputError(f"precision '{precision}' is unknown here; {nearest(precision, DTYPES)}")
    return DTYPES[precision]


def _attention(folder: str | Path) -> dict[str, str]:
    """transformers' attention by SDPA, its default, has no cap of the scores (Gemma 2) and leaves it out in silence."""
    config = read_config(folder)
    capped = family_of(config).value(config, "attn_logit_softcapping") is not None
    return {"attn_implementation": "eager"} if capped else {}


def _dtype(dtype: torch.dtype | str) -> dict[str, torch.dtype | str]:
    """The dtype as a keyword argument; transformers renamed it in 4.56 and has warned about the old name since."""
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": dtype}
