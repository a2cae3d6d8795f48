"""DeepSeek: what V2 (`deepseek_v2.py`: V2-Lite) and V3 (`deepseek_v3.py`: Moonlight) have in common.

Attention is multi-latent. The first layers are dense, the others mixtures with shared experts, which the config counts
in widths of a routed one. V2 takes the softmax's probabilities of the chosen experts as they are. V3 takes sigmoids,
adds a correction bias when experts are chosen, and to nothing else, and normalizes. Routers compute in fp32.

Where a config has YaRN with `mscale_all_dim`, DeepSeek's own code, Megatron and transformers' class of V3 multiply the
softmax's scale by it. transformers' class of V2 does not, so `evaluation/latents.py` mends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.json_types import HfConfig, Json, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.base import LLAMA_DEFAULTS, Family
from nemo_minitron.families.bridge import yarn_fields
from nemo_minitron.families.stored import LLAMA_TENSORS
from nemo_minitron.families.translate import MTP, fixed

_LAYER = "model.layers.{i}."
MLP, _ATTENTION = f"{_LAYER}mlp.", f"{_LAYER}self_attn."
_BRANCHES = ("gate", "up", "down")
_ONLY: JsonFields = {  # key -> its only legal value
    "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1, "num_nextn_predict_layers": 0,
    "rope_interleave": True,
}  # fmt: skip
YARN = {  # field of Megatron's multi-latent attention -> the provider's field of YaRN, as `yarn_fields` has it
    "rotary_scaling_factor": "yarn_rotary_scaling_factor",
    "original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "mscale": "yarn_mscale",
    "mscale_all_dim": "yarn_mscale_all_dim",
}


FIXED = fixed(
    "num_moe_experts", "seq_len_interpolation_factor", multi_latent_attention=True, qk_layernorm=True,
    cache_mla_latents=False, mla_down_proj_fusion=False,
)  # fmt: skip
DEFAULTS: JsonObject = LLAMA_DEFAULTS | {
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip


class Deepseek(Family):
    """What both classes have in common."""

    hosts: ClassVar[tuple[str, ...]] = ("bridge",)
    nemo_model = "DeepSeekModel"
    tensors: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **{
            name: parts
            for name, parts in LLAMA_TENSORS.items()
            if not name.endswith(("k_proj.weight", "v_proj.weight"))
        },
        f"{_ATTENTION}q_a_proj.weight": ("layers.{i}.q_down.weight",),
        f"{_ATTENTION}q_a_layernorm.weight": ("layers.{i}.q_latent_norm.weight",),
        f"{_ATTENTION}q_b_proj.weight": ("layers.{i}.q_up.weight",),
        f"{_ATTENTION}kv_a_proj_with_mqa.weight": ("layers.{i}.kv_down.weight", "layers.{i}.k_rope.weight"),
        f"{_ATTENTION}kv_a_layernorm.weight": ("layers.{i}.kv_latent_norm.weight",),
        f"{_ATTENTION}kv_b_proj.weight": ("layers.{i}.kv_up.weight",),
        f"{MLP}gate.weight": ("layers.{i}.router.weight",),
        **{f"{MLP}shared_experts.{n}_proj.weight": (f"layers.{{i}}.shared_expert.{n}.weight",) for n in _BRANCHES},
        **{f"{MLP}experts.{{e}}.{n}_proj.weight": (f"layers.{{i}}.experts.{{e}}.{n}.weight",) for n in _BRANCHES},
    }
    sizes: ClassVar[Mapping[str, str]] = {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "vocab_size": "vocab_size",
        "num_moe_experts": "n_routed_experts",
        "moe_router_topk": "num_experts_per_tok",
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "kv_lora_rank": "kv_lora_rank",
        "qk_pos_emb_head_dim": "qk_rope_head_dim",
        "v_head_dim": "v_head_dim",
    }
    rope_types: ClassVar[tuple[str, ...]] = ("default", "yarn")
    reads = frozenset({
        *_ONLY, "first_k_dense_replace", "n_group", "n_shared_experts", "norm_topk_prob", "num_key_value_heads",
        "q_lora_rank", "qk_nope_head_dim", "routed_scaling_factor", "scoring_func", "topk_group", "topk_method",
    })  # fmt: skip
    # transformers' classes set both widths of a head themselves; the others are of a training's loss and layout
    no_effect = frozenset({"aux_loss_alpha", "ep_size", "head_dim", "qk_head_dim", "seq_aux"})
    # transformers 5 runs the experts as one grouped matrix product, which needs rows of 16 bytes: 8 elements of 16 bits
    multiples: ClassVar[Mapping[str, int | str]] = {
        "hidden_size": 8, "moe_ffn_hidden_size": 8, "moe_shared_expert_intermediate_size": "moe_ffn_hidden_size",
    }  # fmt: skip
    exact_axes = frozenset({"expert_ffn", "ffn", "heads", "layers", "shared_expert_ffn", "vocab"})
    only: ClassVar[JsonFields] = {}
    """The class's own keys -> their legal values, null among them if a silent config is one."""
    score: ClassVar[str]
    """Megatron's name of the function that makes scores of a router's logits."""
    of_group: ClassVar[int]
    """How many experts' scores transformers adds to rank a router's group."""

    # -- config -> Architecture ------------------------------------------------------------------------
    def read_sizes(self, config: HfConfig) -> dict[str, int]:
        """As in Family, with what the config says in other units."""
        sizes = super().read_sizes(config)
        rope, nope = sizes["qk_pos_emb_head_dim"], self._whole(config, "qk_nope_head_dim")
        shared = self._whole(config, "n_shared_experts") * self._number(sizes["moe_ffn_hidden_size"])
        own = {"num_query_groups": 1, "head_dim": nope + self._number(rope)}
        own |= {"moe_shared_expert_intermediate_size": shared}
        return sizes | own | {"q_lora_rank": self.value(config, "q_lora_rank")}

    def _whole(self, config: HfConfig, name: str, least: int = 1) -> int:
        value = self.value(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"the config's {name} is {value!r}; it must be a whole number of at least {least}")
        return value

    @staticmethod
    def _number(value: Json) -> int:
        """A size that the Architecture has yet to check."""
        return value if isinstance(value, int) else 0

    def features(self, config: HfConfig) -> JsonObject:
        self._check(config)
        layers, dense = super().read_sizes(config)["num_layers"], self._whole(config, "first_k_dense_replace", 0)
        if isinstance(layers, int) and dense >= layers:
            raise InputError(
                f"the config's first_k_dense_replace is {dense} of {layers} layers, so that none is a mixture of "
                f"experts; the nearest legal number is {layers - 1}"
            )
        known = layers if isinstance(layers, int) and 0 < layers <= 10_000 else 1
        pattern = tuple(int(layer >= dense) for layer in range(known))
        return super().features(config) | {"moe_layer_freq": pattern, "moe_router_num_groups": self._groups(config)[0]}

    def _check(self, config: HfConfig) -> None:
        """Raises InputError for a key with another value than Megatron or transformers' class has."""
        if config.get("num_nextn_predict_layers"):
            raise InputError(f"the config's num_nextn_predict_layers is {config['num_nextn_predict_layers']!r}; {MTP}")
        for name, legal in _ONLY.items():
            if (value := config.get(name)) not in (None, legal):
                raise InputError(f"the config's {name} is {value!r}; a {self.hf_class} here needs {legal!r}")
        for name, values in self.only.items():
            if (value := self.value(config, name)) not in (None, *values):
                legal = " or ".join(map(repr, values))
                raise InputError(f"the config's {name} is {value!r}; a {self.hf_class} here needs {legal}")
        heads, own = self.value(config, "num_attention_heads"), config.get("num_key_value_heads")
        if own not in (None, heads):
            raise InputError(f"the config's num_key_value_heads is {own!r}; each head needs its own key: {heads!r}")

    def _groups(self, config: HfConfig) -> tuple[int | None, int | None]:
        """(The router's groups, those that a token goes to); None without groups.

        Raises InputError for numbers that contradict each other, and where Megatron ranks groups otherwise: it adds
        the scores of as many experts as a token has in each of its groups, on the average."""
        if not self._grouped(config) or self._whole(config, "n_group") == 1:
            return None, None
        groups, chosen = self._whole(config, "n_group"), self._whole(config, "topk_group")
        experts, topk = (self._whole(config, name) for name in ("n_routed_experts", "num_experts_per_tok"))
        if chosen > groups or experts % groups or topk > chosen * (experts // groups):
            raise InputError(
                f"{experts} experts in n_group={groups} groups, topk_group={chosen} of which have a token's {topk}, "
                "contradict each other"
            )
        if topk // chosen != self.of_group or experts // groups < self.of_group:
            raise InputError(
                f"num_experts_per_tok is {topk} and topk_group is {chosen}: Megatron then ranks groups by "
                f"{topk // chosen} experts of each, and transformers' {self.hf_class} by {self.of_group}; the nearest "
                f"legal num_experts_per_tok is {self.of_group * chosen}"
            )
        return groups, chosen

    def _grouped(self, config: HfConfig) -> bool:
        """Whether the class reads the groups."""
        return True

    # -- Architecture -> config ------------------------------------------------------------------------
    def config(self, architecture: Architecture, base: HfConfig, layers: Sequence[int] | None = None) -> JsonObject:
        """As in Family. The shared experts' width must be a multiple of a routed expert's."""
        a, width = architecture, architecture.moe_ffn_hidden_size or 1
        if not a.num_moe_experts:
            raise InputError(
                f"the layers that stay are all dense, which no {self.hf_class} is; keep at least one layer that is a "
                "mixture of experts"
            )
        shared = a.moe_shared_expert_intermediate_size or 0
        if shared % width or not shared:
            near = max(1, round(shared / width)) * width
            raise InputError(
                f"a {self.hf_class} counts its shared experts in widths of a routed one: shared_expert_ffn={shared} is "
                f"no multiple of expert_ffn={width}; the nearest legal shared_expert_ffn is {near}"
            )
        own: JsonObject = {
            "first_k_dense_replace": len(a.dense_layers), "n_shared_experts": shared // width,
            "q_lora_rank": a.q_lora_rank,
        }  # fmt: skip
        if base.get("num_key_value_heads", 0) is not None:  # null means the number of heads, a silent config may not
            own["num_key_value_heads"] = a.num_attention_heads
        result = super().config(architecture, {**base, **own}, layers)
        unused = not a.dense_layers and "intermediate_size" in base
        return result | ({"intermediate_size": base["intermediate_size"]} if unused else {})

    # -- Megatron --------------------------------------------------------------------------------------
    def nemo_config(self, config: HfConfig) -> tuple[str, JsonObject]:
        self.architecture(config)
        raise InputError(
            f"a {self.hf_class} is not built with NeMo's classes here, but with Megatron-Bridge's: give --host bridge"
        )

    def bridge_config(self, config: HfConfig) -> JsonObject:
        _, fields = super().nemo_config(config)
        a, (groups, chosen) = self.architecture(config), self._groups(config)
        return fields | self._rope_fields(config) | {
            "num_query_groups": a.num_attention_heads, "kv_lora_rank": a.kv_lora_rank, "q_lora_rank": a.q_lora_rank,
            "qk_head_dim": a.head_dim - (a.qk_pos_emb_head_dim or 0), "qk_pos_emb_head_dim": a.qk_pos_emb_head_dim,
            "v_head_dim": a.v_head_dim, "ffn_hidden_size": self.value(config, "intermediate_size"),
            "moe_router_num_groups": groups, "moe_router_group_topk": chosen,
            "moe_router_topk_scaling_factor": self.value(config, "routed_scaling_factor"),
            "moe_router_enable_expert_bias": a.moe_router_enable_expert_bias,
            "moe_router_bias_update_rate": 0.0,  # the bias is the teacher's, in every training
            "moe_router_score_function": self.score, "moe_router_pre_softmax": self.score == "softmax",
            "moe_router_dtype": "fp32", "moe_aux_loss_coeff": 0.0, "moe_router_load_balancing_type": "aux_loss",
            "multi_latent_attention": True, "qk_layernorm": True, "apply_rope_fusion": False,
        }  # fmt: skip

    def _rope_fields(self, config: HfConfig) -> JsonObject:
        kind, rope = self.rope(config)
        if kind == "default":
            return {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
        if bool(rope.get("mscale")) != bool(rope.get("mscale_all_dim")) and rope.get("mscale") != 1:
            raise InputError(
                f"rope_scaling 'yarn' has mscale {rope.get('mscale')!r} and mscale_all_dim "
                f"{rope.get('mscale_all_dim')!r}, which transformers and DeepSeek's code read in two ways; give both"
            )
        fields = yarn_fields(rope, self.value(config, "max_position_embeddings"))
        if not fields["yarn_correction_range_round_to_int"]:
            raise InputError("rope_scaling 'yarn' has truncate False; multi-latent attention needs true")
        return {"rope_type": "yarn", **{name: fields[theirs] for name, theirs in YARN.items()}}

    def claims(self, fields: JsonFields) -> bool:
        return bool(fields.get("multi_latent_attention")) and fields.get("moe_router_score_function") == self.score

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        """As in Family, of a checkpoint of Bridge."""
        config = super().from_nemo(fields)
        freq, layers = fields["moe_layer_freq"], fields["num_layers"]
        dense = 0 if isinstance(freq, int) else list(freq).index(1)
        if freq not in (1, [1] * layers) and list(freq) != [0] * dense + [1] * (layers - dense):
            raise InputError(f"the model's moe_layer_freq is {freq!r}; a {self.hf_class} is dense in its first layers")
        return config | {
            "first_k_dense_replace": dense, "num_key_value_heads": fields["num_attention_heads"],
            "n_shared_experts": fields["moe_shared_expert_intermediate_size"] // fields["moe_ffn_hidden_size"],
            "q_lora_rank": fields["q_lora_rank"], "qk_nope_head_dim": fields["qk_head_dim"],
            "n_group": fields["moe_router_num_groups"] or 1, "topk_group": fields["moe_router_group_topk"] or 1,
            "routed_scaling_factor": fields["moe_router_topk_scaling_factor"] or 1.0,
            "norm_topk_prob": self.score == "sigmoid" and fields["moe_router_topk"] > 1,
            "rope_scaling": _scaling(fields),
        }  # fmt: skip


def _scaling(fields: JsonFields) -> JsonObject | None:
    if fields["rope_type"] == "rope":
        return None
    scaling = {"factor" if name == "rotary_scaling_factor" else name: fields[name] for name in YARN}
    if not scaling["mscale_all_dim"]:
        del scaling["mscale"], scaling["mscale_all_dim"]
    return {"rope_type": "yarn", **scaling}
