"""Loads a Hugging Face folder as a transformers model: offline, from safetensors only, without remote code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.errors import InputError, first_line, nearest
from nemo_minitron.families import from_hf, read_config

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
    from_hf(folder)  # refuses, in one sentence, a folder that is not of a supported family
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
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"transformers cannot load the model '{folder}': {first_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys"):
        if info[problem]:
            kind = problem.removesuffix("_keys")
            raise InputError(f"the model '{folder}' has {kind} weights, such as '{min(info[problem])}'")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def config_object(folder: str | Path) -> PretrainedConfig:
    """transformers' config of a folder, whichever version of transformers wrote its config.json.

    transformers 4 ignores the keys of transformers 5, so `from_pretrained` alone would use the wrong rotary base.
    """
    from transformers import CONFIG_MAPPING

    config = read_config(folder)
    kind = config["model_type"]
    if kind == "mistral" and "layer_types" in config:  # as transformers' AutoConfig does
        kind = "ministral"
    return CONFIG_MAPPING[kind].from_dict(config | {"model_type": kind})


def dtype_name(precision: str) -> str:
    """torch's name of a precision. Raises InputError for an unknown precision."""
    if precision not in DTYPES:
        raise InputError(f"precision '{precision}' is unknown here; {nearest(precision, DTYPES)}")
    return DTYPES[precision]


def _dtype(dtype: torch.dtype | str) -> dict[str, torch.dtype | str]:
    """The dtype as a keyword argument; transformers renamed it in 4.56 and has warned about the old name since."""
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": dtype}
