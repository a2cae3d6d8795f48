"""The keys of a Hugging Face config: which are read, which have no effect, and which are refused.

transformers' class of a family knows a set of keys. The tables of a family and those here claim each key once, so that
no key that changes what a model computes is left unread. `tests/families/test_config_keys.py` compares them with the
classes of transformers 4 and 5.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_minitron.artifacts.json_types import HfConfig, JsonFields
from nemo_minitron.errors import InputError, nearest

FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names for the kinds of attention of a layer

READ = frozenset({"architectures", "model_type", "tie_word_embeddings", "rope_scaling", "torch_dtype"})
"""Keys that are read in every family, beside those of its tables; `forms.normalized` reads those of transformers 5."""

NO_EFFECT = frozenset({
    # for training and for the Python interface; no logit depends on them
    "attention_dropout", "attn_implementation", "initializer_range", "is_decoder", "output_attentions",
    "output_hidden_states", "output_router_logits", "pretraining_tp", "return_dict", "tf_legacy_loss", "torchscript",
    "use_bfloat16", "use_cache",
    # not read by decoders
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "sep_token_id",
    "tie_encoder_decoder",
    # names and records
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "auto_map",
    "finetuning_task", "id2label", "label2id", "name_or_path", "num_labels", "prefix", "problem_type",
    "task_specific_params", "tokenizer_class", "transformers_version",
    # for generation of text; no logit depends on them
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_scores", "pad_token_id", "remove_invalid_values",
    "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
})  # fmt: skip
"""Keys that may have any value, in every family."""

ONE_VALUE: JsonFields = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "quantization_config": None,
}
"""Key that changes what a model computes -> the only value that is supported; null counts as that value."""

PER_LAYER: JsonFields = {
    "layer_types": FULL,
    "mlp_layer_types": "dense",
    "no_rope_layers": 1,
    "mlp_only_layers": None,
    "moe_layers": None,
}
"""Key with a value for each layer -> the only value that is supported if the family does not read the key (None: no
layer may be listed)."""


def check_keys(config: HfConfig, read: frozenset[str], hf_class: str) -> None:
    """Raises InputError for a key that changes what the model computes and that the family does not read."""
    for name, legal in ONE_VALUE.items():
        value = config.get(name)
        if name not in read and value is not None and value != legal:
            raise InputError(
                f"the config's {name} is {_short(value)}, which is not supported for a {hf_class}; legal is {legal!r}"
            )
    for name, legal in PER_LAYER.items():
        value = config.get(name)
        if name not in read and value and (not isinstance(value, list) or set(map(str, value)) != {str(legal)}):
            raise InputError(
                f"the config's {name} is {_short(value)}, which is not supported for a {hf_class}; remove the key "
                "if the model's layers are all alike"
            )
    if "layer_types" in read:
        layer_types(config)


def layer_types(config: HfConfig) -> list[str]:
    """transformers' name for the attention of each layer; empty if the config does not say.

    Raises InputError if the list has another length than the model has layers, or a name that transformers lacks."""
    kinds, layers = config.get("layer_types") or [], config.get("num_hidden_layers")
    if not isinstance(kinds, list) or len(kinds) not in (0, layers):
        raise InputError(f"the config's layer_types is {_short(kinds)}; it needs one word for each of {layers} layers")
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise InputError(f"the config's layer_types has {kind!r}; {nearest(str(kind), (FULL, SLIDING))}")
    return kinds


def unread_keys(config: HfConfig, read: frozenset[str]) -> list[str]:
    """The keys of a normalized config that neither transformers' class nor this package reads, sorted."""
    return sorted(config.keys() - read - NO_EFFECT - READ - ONE_VALUE.keys() - PER_LAYER.keys())


def cut_layer_lists(
    config: HfConfig, unread: Sequence[str], before: int, after: int, layers: Sequence[int] | None
) -> dict[str, list[object]]:
    """Key -> its list with one value a layer, cut from `before` layers to the `after` layers that stay.

    `layers`: the layers that stay, sorted, if they are known. `unread`: keys that nothing reads; their lists may or may
    not hold one value a layer. Raises InputError if the layers differ and it is not known which ones stay, or what the
    list means.
    """
    cut_lists = {}
    for name in sorted({*unread, *PER_LAYER}):
        values = config.get(name)
        if not isinstance(values, list) or len(values) != before or name == "mlp_only_layers":
            continue
        alike = all(value == values[0] for value in values)
        if not alike and name in unread:
            raise InputError(
                f"the config's {name} has one value for each of the {before} layers, and neither transformers nor this "
                f"package reads it, so its layers cannot be cut; remove {name}, or keep all layers"
            )
        cut_lists[name] = values[:1] * after if layers is None else [values[layer] for layer in layers]
        if not alike and layers is None:
            raise InputError(
                f"the {name} of this model differ from layer to layer, so that its layers cannot be cut to {after} "
                f"before it is known which ones stay; the nearest legal number is {before}"
            )
    return cut_lists


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
