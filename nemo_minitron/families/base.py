"""A model family translates: Hugging Face's config <-> Architecture <-> NeMo's config; Hugging Face's names <->
canonical.

No torch here: a config is a dict, a name is a string. A family is a subclass with tables; a family that follows
Llama's field names changes only what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from nemo_minitron import windows
from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.json_types import HfConfig, Json, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families import forms, keys, translate
from nemo_minitron.families.numbers import check_numbers
from nemo_minitron.families.stored import Stored

LLAMA_SIZES = {  # Architecture field -> Hugging Face field
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
}
LLAMA_DEFAULTS: JsonObject = {  # the defaults of transformers, for fields that a config omits
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
NEMO_FIELDS = {  # NeMo's GPTConfig field -> Hugging Face field
    "init_method_std": "initializer_range",
    "layernorm_epsilon": "rms_norm_eps",
    "seq_length": "max_position_embeddings",
    "rotary_base": "rope_theta",
}


class Family(Stored):
    """Class attributes are the tables; see `families/llama.py` for a whole family."""

    model_type: ClassVar[str]
    hf_class: ClassVar[str]
    hosts: ClassVar[tuple[str, ...]] = ("nemo", "bridge")
    """The hosts whose Megatron-core has all that the family needs."""
    nemo_model: ClassVar[str]
    nemo_class: ClassVar[str]
    """NeMo's config class."""
    sizes: ClassVar[Mapping[str, str]] = LLAMA_SIZES
    defaults: ClassVar[JsonFields] = LLAMA_DEFAULTS
    nemo_fields: ClassVar[Mapping[str, str]] = NEMO_FIELDS
    nemo_fixed: ClassVar[JsonFields] = translate.fixed("seq_len_interpolation_factor")
    """NeMo's field -> the only value that transformers' class of the family can represent."""
    rope_types: ClassVar[tuple[str, ...]] = ("default", "linear")
    """The kinds of Hugging Face's `rope_scaling` that NeMo's class supports."""
    rope_types_of_bridge: ClassVar[tuple[str, ...]] = ()
    """The kinds that the family's own fields of Megatron-Bridge have, beside those of every family."""
    exact_axes: ClassVar[frozenset[str]] = frozenset({"ffn", "heads", "query_groups", "layers", "vocab"})
    """Axes along which cutting an all-zero unit changes no logit (never hidden, because norms divide by its size)."""
    activation: ClassVar[str] = "hidden_act"
    """The config's key of the MLP's activation."""
    own_activation: ClassVar[str] = ""
    """The dotted name of an activation that no key says, in a family that always has it."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """Config keys that the family's methods read, beside those of its tables."""
    no_effect: ClassVar[frozenset[str]] = frozenset()
    """Config keys that transformers' class of the family knows but that change no logit, beside those of
    `keys.NO_EFFECT`."""

    multiples: ClassVar[Mapping[str, int | str]] = {}
    """Field of an Architecture -> a number, or another field, that it must be a multiple of, so that every transformers
    from 4.51 on runs the model."""

    @property
    def read(self) -> frozenset[str]:
        """The keys of a normalized config that this family reads, or knows to have no effect."""
        named = {*self.sizes.values(), *self.defaults, *self.nemo_fields.values()}
        return frozenset(named | self.reads | self.no_effect)

    def architecture(self, config: HfConfig) -> Architecture:
        """The Architecture of a Hugging Face config.

        Raises InputError if the config lacks a size or has an illegal one, if it has a number that no model can have,
        and if a key that is not read here changes what the model computes."""
        kind = config.get("model_type", self.model_type)
        if kind != self.model_type:
            raise InputError(f"the config's model_type is {kind!r}; that of a {self.hf_class} is '{self.model_type}'")
        keys.check_keys(config, self.read, self.hf_class)
        values: JsonObject = {**self.read_sizes(config), **self.features(config)}
        architecture = Architecture(**values)
        check_numbers(config)
        fields, layers = self.windows(config), architecture.num_layers
        window, skip = fields.get("window_size"), fields.get("window_attn_skip_freq")
        return architecture.replace(**windows.of_megatron(window, skip, layers))

    def unread(self, config: HfConfig) -> list[str]:
        """The keys of a normalized config that neither transformers' class nor this package reads."""
        return keys.unread_keys(config, self.read)

    def value(self, config: HfConfig, name: str) -> Json:
        """A field of a Hugging Face config; if the config omits it, transformers' default."""
        return config.get(name, self.defaults.get(name))

    def read_sizes(self, config: HfConfig) -> dict[str, int]:
        derived = _derived_sizes(config)
        sizes = {}
        for field, name in self.sizes.items():
            value = self.value(config, name)
            value = derived.get(field) if value is None else value
            if value is None:
                raise InputError(f"the config of this {self.model_type} model has no '{name}'")
            sizes[field] = value
        return sizes

    def features(self, config: HfConfig) -> JsonObject:
        """The fields of the Architecture other than sizes."""
        return {"tied_embeddings": bool(config.get("tie_word_embeddings", False))}

    def windows(self, config: HfConfig) -> JsonObject:
        """NeMo's fields for windows of attention (`translate.nemo_window`); none for a family without windows."""
        return {}

    def config(self, architecture: Architecture, base: HfConfig, layers: Sequence[int] | None = None) -> JsonObject:
        """`base` with the sizes of `architecture`; head_dim is always written out.

        `layers`: the layers of `base` that stay, sorted; lists with one value a layer are cut with them. None: the kept
        layers are not known, so all layers must be alike. Raises InputError for what the family cannot represent.
        """
        result = dict(base) | {name: getattr(architecture, field) for field, name in self.sizes.items()}
        if architecture.num_layers != (count := self.read_sizes(base)["num_layers"]):
            result |= keys.cut_layer_lists(base, self.unread(base), count, architecture.num_layers, layers)
        if self.architecture(result) != architecture:
            raise InputError(f"a {self.hf_class} config cannot represent {architecture}")
        return result

    def written(self, config: HfConfig) -> JsonObject:
        """A normalized config in the form that a student stores: transformers 4 and 5 read the same from it."""
        part = self.value(config, "partial_rotary_factor") if "partial_rotary_factor" in self.defaults else None
        return forms.both_forms(config, self.value(config, "rope_theta"), part)

    def loads(self, config: HfConfig) -> Mapping[str, int | str]:
        """`multiples` for the cuts of one model."""
        return self.multiples

    def remark(self, architecture: Architecture) -> str | None:
        """One sentence if some version of transformers cannot load a student of these sizes; else None."""
        for field, divisor in self.multiples.items():
            size = getattr(architecture, field)
            multiple = getattr(architecture, divisor) if isinstance(divisor, str) else divisor
            if size is not None and size % multiple:
                near = max(1, round(size / multiple)) * multiple
                return (
                    f"transformers 5 runs a {self.hf_class} only where its {field} is a multiple of {multiple}; "
                    f"{size} is not, though transformers 4 runs it; the nearest size is {near}"
                )
        return None

    def unserved(self, config: HfConfig) -> dict[str, str]:
        """Engine of `minitron serving` -> why its own class of the family is another model than this config's."""
        return {}

    def rope(self, config: HfConfig) -> tuple[str, JsonFields]:
        """Kind and fields of the scaling of positions."""
        return translate.rope_of(config)

    def routers_loss(self, config: HfConfig) -> float:
        """The coefficient of the routers' load-balancing loss in a training on text; 0.0 without a mixture."""
        key = self.nemo_fields.get("moe_aux_loss_coeff")
        return self.value(config, key) if key else 0.0

    def nemo_config(self, config: HfConfig) -> tuple[str, JsonObject]:
        """The name of NeMo's config class and its arguments, as plain values; a function is given by its dotted name.

        Raises InputError if NeMo's class of the family cannot represent the model.
        """
        architecture = self.architecture(config)
        fields = {name: self.value(config, key) for name, key in self.nemo_fields.items()}
        fields |= nemo_sizes(architecture) | translate.nemo_biases(architecture, self.hf_class)
        fields |= translate.nemo_activation(self.value(config, self.activation), self.defaults[self.activation])
        rope = translate.nemo_rope(config, self.rope_types, self.nemo_model, self.rope_types_of_bridge)
        return self.nemo_class, fields | self.windows(config) | rope

    def bridge_config(self, config: HfConfig) -> JsonObject:
        """The same for Megatron-Bridge: NeMo's fields, and those of its provider that NeMo's config lacks. A scaling of
        positions that only Bridge has is not in `config` (`bridge.bridge_fields`)."""
        return self.nemo_config(config)[1]

    def claims(self, fields: JsonFields) -> bool:
        """Whether a NeMo config of the family's class is this family's, where other families share the class."""
        return bool(fields.get("num_moe_experts")) == ("num_moe_experts" in self.sizes)

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        """The Hugging Face config of a NeMo config's fields (those that were set, and the class's defaults).

        Raises InputError if transformers' class of the family cannot represent the NeMo model.
        """
        translate.check_fixed(fields, self.nemo_fixed, self.hf_class)
        return {
            "architectures": [self.hf_class],
            "model_type": self.model_type,
            self.activation: translate.hf_activation(fields.get("activation_func"), self.defaults[self.activation]),
            "tie_word_embeddings": bool(fields["share_embeddings_and_output_weights"]),
            **translate.hf_sizes(fields, self.sizes),
            **{key: fields[name] for name, key in self.nemo_fields.items()},
            **translate.hf_rope(fields),
        }


def _derived_sizes(config: HfConfig) -> dict[str, int]:
    """Sizes that transformers derives if they are null or have no default."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        return {"num_query_groups": heads, "head_dim": hidden // heads}
    return {}


def nemo_sizes(architecture: Architecture) -> JsonObject:
    """The fields of NeMo's GPTConfig that follow from the Architecture; fields of mixtures only for a mixture of
    experts."""
    a = architecture
    mixture = {
        "num_moe_experts": a.num_moe_experts,
        "moe_router_topk": a.moe_router_topk,
        "moe_ffn_hidden_size": a.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": a.moe_shared_expert_intermediate_size,
        "moe_layer_freq": list(a.moe_layer_freq) if isinstance(a.moe_layer_freq, tuple) else a.moe_layer_freq,
    }
    return (mixture if a.num_moe_experts else {}) | {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_query_groups,
        "kv_channels": architecture.head_dim,
        "vocab_size": architecture.vocab_size,
        "share_embeddings_and_output_weights": architecture.tied_embeddings,
        "make_vocab_size_divisible_by": _largest_power_of_two(architecture.vocab_size, 128),
    }


def _largest_power_of_two(value: int, most: int) -> int:
    """The largest power of two up to `most` that divides `value`; with it NeMo does not pad the vocabulary at TP=1."""
    while value % most:
        most //= 2
    return most
