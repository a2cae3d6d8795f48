"""Plans for pico models, written by hand, and the same cuts in plain numpy, for comparison."""

import numpy as np

from nemo_minitron.artifacts import PrunePlan

LAYERS = [0, 2, 5]
HIDDEN = [i for i in range(48) if i % 7 != 3]  # 41
FFN = {layer: sorted((np.arange(50) * 7 + layer) % 96) for layer in LAYERS}  # 50, another set in each layer
HEADS = {0: [0, 2, 5], 2: [1, 3, 4], 5: [1, 2, 4]}  # one of each group of two
GROUPS = {0: [0, 1], 2: [1, 2], 5: [0, 2]}


def width_and_depth(source):
    """Cuts layers, hidden, ffn and one head of each query group."""
    keep = {"layers": LAYERS, "hidden": HIDDEN, "heads": HEADS}
    keep["ffn"] = {layer: [int(i) for i in kept] for layer, kept in FFN.items()}
    target = source.replace(num_layers=3, hidden_size=41, ffn_hidden_size=50, num_attention_heads=3)
    return PrunePlan(source=source, target=target, keep=keep)


def whole_groups(source):
    """Cuts layers and one query group of three, with its two heads."""
    heads = {layer: [2 * g + i for g in kept for i in (0, 1)] for layer, kept in GROUPS.items()}
    target = source.replace(num_layers=3, num_attention_heads=4, num_query_groups=2)
    keep = {"layers": LAYERS, "query_groups": GROUPS, "heads": heads}
    return PrunePlan(source=source, target=target, keep=keep)


def slice_by_hand(tensors, plan, head_dim=8):
    """Hugging Face Llama tensors (name -> array) cut with numpy alone, without the table of axes."""
    student = {}
    hidden = plan.keep.get("hidden", list(range(48)))
    for new, old in enumerate(plan.keep["layers"]):
        heads = plan.keep["heads"][old]
        groups = plan.keep.get("query_groups", {}).get(old, [0, 1, 2])
        ffn = plan.keep.get("ffn", {}).get(old, list(range(96)))
        q = [h * head_dim + i for h in heads for i in range(head_dim)]
        kv = [g * head_dim + i for g in groups for i in range(head_dim)]
        rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": ffn, "up_proj": ffn}
        columns = {"o_proj": q, "down_proj": ffn}
        for name, tensor in tensors.items():
            prefix, local = f"model.layers.{old}.", name.split(".")[-2]
            if not name.startswith(prefix):
                continue
            if local in rows:
                cut = tensor[rows[local]] if tensor.ndim == 1 else tensor[rows[local]][:, hidden]
            elif local in columns:
                cut = tensor[hidden] if tensor.ndim == 1 else tensor[hidden][:, columns[local]]
            else:
                cut = tensor[hidden]
            student[name.replace(prefix, f"model.layers.{new}.")] = cut
    student["model.norm.weight"] = tensors["model.norm.weight"][hidden]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            student[name] = tensors[name][:, hidden]
    return student
