"""Refuses numbers in a Hugging Face config that no trained model has, such as NaN, infinity or an epsilon of 1e300."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from nemo_minitron.artifacts.json_types import HfConfig, JsonFields
from nemo_minitron.errors import InputError

RANGES: dict[str, tuple[float, float]] = {  # key -> least and largest legal value; wide enough for any real model
    "rms_norm_eps": (0.0, 0.1),
    "layer_norm_eps": (0.0, 0.1),
    "norm_eps": (0.0, 0.1),
    "initializer_range": (0.0, 100.0),
    "rope_theta": (1.0, 1e15),
    "rope_local_base_freq": (1.0, 1e15),
    "query_pre_attn_scalar": (1e-6, 1e6),
    "attn_logit_softcapping": (1e-3, 1e6),
    "final_logit_softcapping": (1e-3, 1e6),
    "partial_rotary_factor": (0.0, 1.0),
    "max_position_embeddings": (1, 2**31 - 1),
    "original_max_position_embeddings": (1, 2**31 - 1),
    "chunk_size": (1, 2**31 - 1),
    "sliding_window": (0, 2**31 - 1),
    "factor": (1e-3, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "attention_factor": (1e-6, 1e6),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "router_aux_loss_coef": (0.0, 1e6),
    "routed_scaling_factor": (1e-6, 1e6),
    "mscale": (0.0, 1e3),
    "mscale_all_dim": (0.0, 1e3),
    "router_jitter_noise": (0.0, 1.0),
    "attention_dropout": (0.0, 1.0),
    "hidden_dropout": (0.0, 1.0),
    "embd_pdrop": (0.0, 1.0),
    "resid_pdrop": (0.0, 1.0),
    "residual_dropout": (0.0, 1.0),
    "attention_multiplier": (1e-6, 1e6),
    "embedding_multiplier": (1e-6, 1e6),
    "logits_scaling": (1e-6, 1e6),
    "residual_multiplier": (1e-3, 1e3),
}


MAY_BE_INFINITE = ("time_step_limit",)  # the family of such a config checks it


def check_numbers(config: HfConfig) -> None:
    """Raises InputError, with the key and the legal range, for a number in the config or in a nested object that is not
    finite, or that no model can have. An absent or null key means the default of transformers' class."""
    for key, value in _leaves(config):
        name = key.rsplit(".", 1)[-1]
        if isinstance(value, float) and not math.isfinite(value) and name not in MAY_BE_INFINITE:
            raise InputError(f"the config's '{key}' is {value}; it must be a finite number")
        if name not in RANGES or value is None:
            continue
        least, most = RANGES[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise InputError(f"the config's '{key}' is {_short(value)}; it must be a number from {least:g} to {most:g}")


def _leaves(values: JsonFields, prefix: str = "", depth: int = 4) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            if depth:
                yield from _leaves(value, f"{prefix}{key}.", depth - 1)
        elif isinstance(value, (list, tuple)):
            yield from ((f"{prefix}{key}", item) for item in value if isinstance(item, float))
        else:
            yield f"{prefix}{key}", value


def _short(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 100:
        return f"a whole number of {value.bit_length()} bits"
    return repr(value)[:60]
