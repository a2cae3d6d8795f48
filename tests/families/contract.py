"""What every family is tested with: random models, one plan that cuts all axes, and its cuts by hand.

Each family has two models: `own` with its own activation, `other` with another one, tied embeddings, and what else
its config can say (biases in every linear layer, linear rotary scaling).
"""

from importlib import metadata

import latent_contract as latents
import numpy as np
import pico
from latent_contract import FFN, HEAD_DIM, channels, neurons

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.axes import AXES
from nemo_minitron.families import FAMILIES, family_of
from nemo_minitron.families.bridge import bridge_fields

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "truncate": False}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0}
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"hidden_act": "gelu", "tie_word_embeddings": True}
OTHER = TIED | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWED = {"use_sliding_window": True, "sliding_window": 8}  # in some layers; the tests' samples are longer
MODELS = {
    "llama": {"own": {"rope_scaling": LLAMA3_ROPE}, "other": OTHER | BIASES},
    "mistral": {"own": {"sliding_window": 8}, "other": OTHER | {"sliding_window": None, "hidden_act": "relu"}},
    "ministral": {
        "own": {"sliding_window": 8, "layer_types": [FULL, SLIDING, SLIDING, FULL]},
        "other": OTHER | {"sliding_window": 8, "layer_types": [SLIDING, FULL, FULL, FULL]},
    },
    "mixtral": {"own": {"sliding_window": 8}, "other": OTHER | {"sliding_window": None, "num_experts_per_tok": 3}},
    "qwen2": {"own": WINDOWED | {"max_window_layers": 2}, "other": OTHER},
    "qwen3": {"own": WINDOWED | {"max_window_layers": 1}, "other": OTHER | {"hidden_act": "relu2"}},
    "qwen3_moe": {  # with a window and normalized probabilities; with a dense layer and neither
        "own": {"moe_intermediate_size": 80, "intermediate_size": 88, "use_sliding_window": True, "sliding_window": 8}
        | {"num_experts_per_tok": 3},
        "other": OTHER
        | {"moe_intermediate_size": 80, "norm_topk_prob": False, "mlp_only_layers": [2], "num_experts_per_tok": 3},
    },
    "qwen2_moe": {  # with biases and probabilities as they are; with a dense layer and neither
        "own": {"moe_intermediate_size": 80, "shared_expert_intermediate_size": 160, "num_experts_per_tok": 3},
        "other": OTHER
        | {"moe_intermediate_size": 80, "shared_expert_intermediate_size": 160, "num_experts_per_tok": 3}
        | {"norm_topk_prob": True, "mlp_only_layers": [2], "qkv_bias": False},
    },
    "nemotron": {"own": {}, "other": TIED | BIASES | {"partial_rotary_factor": 0.5}},
    "smollm3": {
        "own": WINDOWED | {"no_rope_layer_interval": 2},
        "other": OTHER | BIASES | {"no_rope_layer_interval": 3},
    },
    "gpt_oss": {
        "own": {"sliding_window": 8, "num_experts_per_tok": 3, "rope_scaling": YARN},
        "other": OTHER | {"sliding_window": 8, "layer_types": [FULL, SLIDING, SLIDING, FULL]},
    },
    **latents.MODELS,
    "arcee": {"own": {}, "other": OTHER | BIASES},
    "seed_oss": {"own": {}, "other": OTHER},
    "granite": {"own": {}, "other": OTHER | BIASES | {"residual_multiplier": 1.7}},
    "gemma2": {
        "own": {"tie_word_embeddings": True},
        "other": OTHER | {"hidden_activation": "gelu", "attn_logit_softcapping": None, "tie_word_embeddings": False},
    },
    "gemma3_text": {
        "own": {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "other": {"hidden_activation": "silu", "sliding_window_pattern": 2},
    },
    "phi3": {
        "own": {"sliding_window": 8, "partial_rotary_factor": 0.75},
        "other": TIED | {"sliding_window": None, "hidden_act": "relu"},
    },
}
HYBRIDS = ("nemotron_h",)  # transformers 4 has none; test_nemotron_h.py and hosts/bridge/test_hybrid.py
# transformers 4 needs heads x head_dim for the hidden size: test_qwen2_moe.py, hosts/bridge/test_bridge_qwen2_moe.py
HERE = [name for name in MODELS if name != "qwen2_moe" or not metadata.version("transformers").startswith("4.")]
NAMES = [f"{family}-{variant}" for family in HERE for variant in MODELS[family]]
ON_BRIDGE_ALONE = {family.model_type for family in FAMILIES if "nemo" not in family.hosts}
NEMO_NAMES = [name for name in NAMES if name.split("-")[0] not in ON_BRIDGE_ALONE]

HIDDEN, HEADS, GROUPS, EXPERTS, DEPTH = 48, 12, 4, 4, 4
SIZES = {"num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS}
SIZES |= {"intermediate_size": FFN, "head_dim": HEAD_DIM}

# -- the cut: another set in each layer ------------------------------------------------------------------------
CUT_LAYERS = [0, 2, 3]
CUT_HIDDEN = [i for i in range(HIDDEN) if i % 7 != 3]  # 41
CUT_GROUPS = {0: [0, 3], 2: [1, 2], 3: [0, 1]}
CUT_HEADS = {  # two of the three of each group that stays
    layer: [3 * group + i for group in CUT_GROUPS[layer] for i in two]
    for layer, two in {0: (0, 2), 2: (0, 1), 3: (1, 2)}.items()
}
CUT_EXPERTS = {0: [0, 2, 3], 2: [1, 2, 3], 3: [0, 1, 3]}


def make(folder, name, **overrides):
    """The Hugging Face folder of one of NAMES."""
    family, variant = name.split("-")
    return getattr(pico, f"pico_{family}")(folder, **{**SIZES, **MODELS[family][variant], **overrides})


def everything():
    """What stays, by axis, as a plan has it."""
    return {
        "layers": CUT_LAYERS,
        "hidden": CUT_HIDDEN,
        "query_groups": CUT_GROUPS,
        "heads": CUT_HEADS,
        "ffn": {layer: neurons(layer) for layer in CUT_LAYERS},
        "experts": CUT_EXPERTS,
        "experts_per_token": [0, 1],
        "expert_ffn": {layer: {e: neurons(layer + e) for e in CUT_EXPERTS[layer]} for layer in CUT_LAYERS},
        **latents.cut(CUT_LAYERS),
    }


def nothing():
    """`everything`, but all of it stays: to be changed along one axis."""
    layers, experts = range(DEPTH), range(EXPERTS)
    return {
        "layers": list(layers),
        "hidden": list(range(HIDDEN)),
        "query_groups": {layer: list(range(GROUPS)) for layer in layers},
        "heads": {layer: list(range(HEADS)) for layer in layers},
        "ffn": {layer: list(range(FFN)) for layer in layers},
        "experts": {layer: list(experts) for layer in layers},
        "expert_ffn": {layer: {e: list(range(FFN)) for e in experts} for layer in layers},
        **latents.whole(layers),
    }


def sizes(keep):
    """The student's sizes, as Architecture names them."""
    first = keep["layers"][0]
    return {
        "num_layers": len(keep["layers"]),
        "hidden_size": len(keep["hidden"]),
        "num_query_groups": len(keep["query_groups"][first]),
        "num_attention_heads": len(keep["heads"][first]),
        "ffn_hidden_size": len(keep["ffn"][first]),
    }


def plan_of(source, keep):
    """`keep` as a plan for a model of this Architecture: experts in its mixtures, neurons in its dense layers."""
    target, stay = sizes(keep), keep["layers"]
    mixtures = [layer for layer in stay if layer in source.moe_layers]
    if mixtures:
        experts = keep["experts"][mixtures[0]]
        target["moe_router_topk"] = len(keep.get("experts_per_token", range(source.moe_router_topk)))
        target["num_moe_experts"] = len(experts)
        target["moe_ffn_hidden_size"] = len(keep["expert_ffn"][mixtures[0]][experts[0]])
    of_axis = dict.fromkeys(("experts", "experts_per_token", "expert_ffn", "shared_expert_ffn"), mixtures)
    of_axis |= {"ffn": sorted({*stay} - {*mixtures})}
    keep = {name: kept for name, kept in keep.items() if AXES[name].length(source)}
    if source.kv_lora_rank:
        target["num_query_groups"] = 1
    for name in {"shared_expert_ffn", "q_latent", "kv_latent"} & keep.keys():
        target[AXES[name].size] = len(next(iter(_of_layers(keep[name], of_axis.get(name, stay)).values())))
    cut = {axis: _of_layers(kept, of_axis.get(axis, stay)) for axis, kept in keep.items() if of_axis.get(axis, stay)}
    return PrunePlan(source, source.keep_layers(stay).replace(**target), cut)


def _of_layers(kept, layers):
    return {layer: kept[layer] for layer in layers} if isinstance(kept, dict) else kept


def megatron_fields(config):
    """What the first of the family's hosts is told of the model, and the name of NeMo's class where there is one."""
    family = family_of(config)
    if "nemo" not in family.hosts:
        return bridge_fields(family, config)
    name, fields = family.nemo_config(config)
    return fields | {"class": name}


# -- the same cut without the table of axes, by Hugging Face's names --------------------------------------------
def slice_by_hand(tensors, keep, dtype=None):
    """Hugging Face's tensors of any of the families (name -> array), cut by indexing; kept units in any order.

    `dtype`: that of the raw bits of a Gemma's tensors, whose embeddings keep their scale though fewer channels have a
    smaller multiplier; a tied head's logits keep theirs by the final norm."""
    student = {}
    latent = any("kv_b_proj" in name for name in tensors)
    for name, tensor in tensors.items():
        words = name.split(".")
        if words[1] != "layers":  # embedding, head, final norm
            student[name] = tensor[keep["hidden"]] if tensor.ndim == 1 else tensor[:, keep["hidden"]]
            if dtype is not None:
                student[name] = _rescaled(student[name].view(dtype), name, keep, "lm_head.weight" not in tensors)
            continue
        layer = int(words[2])
        if layer not in keep["layers"]:
            continue
        words[2] = str(keep["layers"].index(layer))
        if words[4] == "experts" and not words[5].isdigit():
            student[".".join(words)] = _stacked(tensor, words[5], layer, keep)
            continue
        if words[4] == "experts":
            expert = int(words[5])
            if expert not in keep["experts"][layer]:
                continue
            words[5] = str(keep["experts"][layer].index(expert))
        student[".".join(words)] = _sliced(tensor, name.split("."), layer, keep, latent)
    return student


def _stacked(tensor, name, layer, keep):
    """gpt-oss's tensor of all experts of a layer: [expert, inputs, outputs], where gate and up take turns."""
    experts = []
    for expert in keep["experts"][layer]:
        ffn = keep["expert_ffn"][layer][expert]
        both = [2 * i + branch for i in ffn for branch in (0, 1)]
        rows, columns = (keep["hidden"], both) if name.startswith("gate_up") else (ffn, keep["hidden"])
        experts.append(tensor[expert][columns] if name.endswith("bias") else tensor[expert][rows][:, columns])
    return np.stack(experts)


def _rescaled(values, name, keep, tied):
    """Raw bits of what stays of the embedding or the final norm of a Gemma."""
    wide, ratio = values.astype(np.float64), len(keep["hidden"]) / HIDDEN
    if name == "model.embed_tokens.weight":
        wide = wide / ratio**0.5
    elif name == "model.norm.weight" and tied:
        wide = (1 + wide) * ratio**0.5 - 1
    return wide.astype(np.float32).astype(values.dtype).view(f"u{values.itemsize}")


def dtype_of(name, dtype=np.float32):
    """For `slice_by_hand`, of one of NAMES; None: nothing is rescaled."""
    return dtype if name.startswith("gemma") else None


def _sliced(tensor, words, layer, keep, latent):
    """A tensor of a layer: rows, then columns; biases and norms have rows only."""
    hidden, ffn, module = keep["hidden"], keep["ffn"][layer], words[-2]
    if words[4] == "experts":
        ffn = keep["expert_ffn"][layer][int(words[5])]
    if words[4].startswith("shared_expert"):
        ffn = keep["shared_expert_ffn"][layer]
    if latent and words[3] == "self_attn":
        return latents.of_latents(tensor, module, layer, keep)
    q, kv = channels(keep["heads"][layer]), channels(keep["query_groups"][layer])
    k = [HEADS * HEAD_DIM + i for i in kv]  # below q in the fused tensor
    rows = {
        "q_proj": q, "k_proj": kv, "v_proj": kv, "qkv_proj": [*q, *k, *(GROUPS * HEAD_DIM + i for i in k)],
        "gate_proj": ffn, "up_proj": ffn, "w1": ffn, "w3": ffn, "gate_up_proj": [*ffn, *(FFN + i for i in ffn)],
        "q_norm": list(range(HEAD_DIM)), "k_norm": list(range(HEAD_DIM)), "gate": keep["experts"][layer],
        "router": keep["experts"][layer], "self_attn": keep["heads"][layer],  # the sinks of gpt-oss
        "shared_expert_gate": [0],
    }.get(module, hidden)  # fmt: skip
    columns = {"o_proj": q, "down_proj": ffn, "w2": ffn}.get(module, hidden)
    return tensor[rows] if tensor.ndim == 1 else tensor[rows][:, columns]


# -- units that write nothing ----------------------------------------------------------------------------------
def silenced(tensors, axis):
    """Makes units of an axis write nothing, in place; returns what a plan keeps when it cuts them."""
    keep = nothing()
    if axis == "layers":
        keep["layers"] = [0, 2, 3]
    for layer in range(DEPTH):
        prefix = f"model.layers.{layer}."
        if axis == "layers" and layer == 1:
            for name in tensors:
                last = name.split(".")[-2] in ("o_proj", "down_proj", "w2") or ".experts.down_proj" in name
                if name.startswith(prefix) and last:
                    tensors[name][:] = 0
        elif axis in ("heads", "query_groups"):
            groups = [g for g in range(GROUPS) if axis == "heads" or g != layer]
            heads = [3 * g + i for g in groups for i in range(3) if axis == "query_groups" or i != layer % 3]
            width = tensors[f"{prefix}self_attn.o_proj.weight"].shape[1] // HEADS
            gone = channels(set(range(HEADS)) - set(heads), width)
            tensors[f"{prefix}self_attn.o_proj.weight"][:, gone] = 0
            keep["heads"][layer], keep["query_groups"][layer] = heads, groups
        elif axis == "ffn":
            keep["ffn"][layer] = neurons(layer)
            gone = sorted(set(range(FFN)) - set(keep["ffn"][layer]))
            if f"{prefix}mlp.down_proj.weight" in tensors:  # a mixture has none
                tensors[f"{prefix}mlp.down_proj.weight"][:, gone] = 0
        elif axis == "shared_expert_ffn":
            keep[axis][layer] = latents.shared(layer, 40)
            latents.silence_shared(tensors, prefix, keep[axis][layer])
        elif axis == "expert_ffn":
            if f"{prefix}mlp.shared_experts.down_proj.weight" in tensors:  # of as many widths of an expert as before
                keep["shared_expert_ffn"] |= {n: latents.shared(n) for n in range(DEPTH)}
                latents.silence_shared(tensors, prefix, keep["shared_expert_ffn"][layer])
            for expert in keep["expert_ffn"][layer]:
                keep["expert_ffn"][layer][expert] = neurons(layer + expert)
                gone = sorted(set(range(FFN)) - set(keep["expert_ffn"][layer][expert]))
                second = (f"experts.{expert}.w2.weight", f"experts.{expert}.down_proj.weight")
                for name in tensors:
                    if name.startswith(prefix) and name.endswith(second):
                        tensors[name][:, gone] = 0
                    elif name == f"{prefix}mlp.experts.down_proj":
                        tensors[name][expert][gone] = 0
    return keep
