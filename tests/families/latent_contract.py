"""What a DeepSeek has beside the other families in their contract (`contract.py`): latents, and shared experts."""

import numpy as np

FFN = 80  # of a dense layer, and of an expert
HEAD_DIM = 8  # of the other families
Q_LATENT, KV_LATENT, QUERY, ROTARY, KEY, VALUE = 20, 18, 10, 4, 6, 7  # latents, and channels of a head
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16, "mscale": 0.9}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 0.6}
SIZES = {"moe_intermediate_size": FFN, "num_key_value_heads": None, "n_group": 1, "topk_group": 1}
SIZES |= {"first_k_dense_replace": 1, "num_experts_per_tok": 2}
OTHER = SIZES | {"hidden_act": "gelu", "tie_word_embeddings": True}
MODELS = {
    "deepseek_v2": {
        "own": SIZES | {"num_experts_per_tok": 3},
        "other": OTHER | {"q_lora_rank": Q_LATENT, "first_k_dense_replace": 2},
    },
    "deepseek_v3": {
        "own": SIZES | {"num_experts_per_tok": 3, "rope_scaling": YARN},
        "other": OTHER | {"q_lora_rank": None, "num_experts_per_tok": 3},
    },
}


def neurons(shift):
    """50 of 80."""
    return sorted(int(i) for i in (np.arange(50) * 7 + shift) % FFN)


def channels(units, width=HEAD_DIM):
    return [unit * width + i for unit in units for i in range(width)]


def cut(layers):
    """What stays of latents and shared experts, another set in each layer."""
    return {
        "shared_expert_ffn": {layer: shared(layer) for layer in layers},
        "q_latent": {layer: [i for i in range(Q_LATENT) if i % 4 != layer] for layer in layers},
        "kv_latent": {layer: [i for i in range(KV_LATENT) if i not in (layer, 7, 9, 13)] for layer in layers},
    }


def whole(layers):
    """`cut`, but all of it stays."""
    sizes = {"shared_expert_ffn": 2 * FFN, "q_latent": Q_LATENT, "kv_latent": KV_LATENT}
    return {axis: {layer: list(range(size)) for layer in layers} for axis, size in sizes.items()}


def shared(shift, width=50):
    """So many of 80, of each of two shared experts."""
    return [FFN * e + i for e in range(2) for i in neurons(shift + e)[:width]]


def silence_shared(tensors, prefix, kept):
    """In a dense layer there is nothing to silence. The two shared experts of a DeepSeek are one of a Qwen2-MoE."""
    for shared in ("shared_experts", "shared_expert"):
        name = f"{prefix}mlp.{shared}.down_proj.weight"
        if name in tensors:
            tensors[name][:, sorted(set(range(2 * FFN)) - set(kept))] = 0


def of_latents(tensor, module, layer, keep):
    """A tensor of a DeepSeek's attention: the rotary rows follow those of the latent of keys and values."""
    heads, hidden, q, kv = keep["heads"][layer], keep["hidden"], keep["q_latent"][layer], keep["kv_latent"][layer]
    rows, columns = {
        "q_proj": (channels(heads, QUERY), hidden), "q_a_proj": (q, hidden), "q_a_layernorm": (q, None),
        "q_b_proj": (channels(heads, QUERY), q), "kv_a_layernorm": (kv, None),
        "kv_a_proj_with_mqa": ([*kv, *range(KV_LATENT, KV_LATENT + ROTARY)], hidden),
        "kv_b_proj": (channels(heads, KEY + VALUE), kv), "o_proj": (hidden, channels(heads, VALUE)),
    }[module]  # fmt: skip
    return tensor[rows] if columns is None else tensor[rows][:, columns]
