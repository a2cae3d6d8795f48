"""A cut of a pico Mamba hybrid, and the same cut by hand, by Hugging Face's names."""

# 6 layers M-M*-M, 8 heads of 6 channels in 2 groups; other units in each layer
LAYERS, HIDDEN = [0, 1, 3, 5], [i for i in range(48) if i % 6 != 2]
MAMBA = {0: [0, 1, 3, 5, 6, 7], 5: [1, 2, 3, 4, 6, 7]}
CHANNELS = {0: [0, 2, 3, 5], 5: [1, 2, 4, 5]}
NEURONS, GROUPS, HEADS = {1: list(range(4, 84))}, {3: [0, 3]}, {3: [0, 1, 6, 7]}
KEEP = {"layers": LAYERS, "hidden": HIDDEN, "ffn": NEURONS, "heads": HEADS, "query_groups": GROUPS}
KEEP |= {"mamba_heads": MAMBA, "mamba_head_dim": CHANNELS}
STUDENT = {"hidden_size": 40, "ffn_hidden_size": 80, "num_attention_heads": 4, "num_query_groups": 2}
STUDENT |= {"mamba_num_heads": 6, "mamba_head_dim": 4}


def channels(heads, width, kept=None):
    return [head * width + i for head in heads for i in (range(width) if kept is None else kept)]


def by_hand(tensors):
    """The teacher's tensors (name -> array), cut by Hugging Face's names."""
    cut = {}
    for name, tensor in tensors.items():
        words = name.split(".")
        if words[1] != "layers":
            cut[name] = tensor[HIDDEN] if tensor.ndim == 1 else tensor[:, HIDDEN]
        elif (layer := int(words[2])) in LAYERS:
            words[2] = str(LAYERS.index(layer))
            cut[".".join(words)] = sliced(tensor, ".".join(words[3:]), layer)
    return cut


def sliced(tensor, name, layer):
    inner, groups, q = [], [], []
    if layer in MAMBA:
        heads = MAMBA[layer]
        inner, of_states = channels(heads, 6, CHANNELS[layer]), list(range(10))
        conv = [*inner, *(48 + i for i in of_states), *(58 + i for i in of_states)]
        rows = [*inner, *(48 + i for i in conv), *(116 + head for head in heads)]
        by_name = {"conv1d.weight": conv, "conv1d.bias": conv, "norm.weight": inner}
        by_name |= dict.fromkeys(("A_log", "D", "dt_bias"), heads)
        if name.removeprefix("mixer.") in by_name and name.startswith("mixer."):
            return tensor[by_name[name.removeprefix("mixer.")]]
        if name == "mixer.in_proj.weight":
            return tensor[rows][:, HIDDEN]
    if name == "norm.weight":
        return tensor[HIDDEN]
    if layer in HEADS:
        q, groups = channels(HEADS[layer], 8), channels(GROUPS[layer], 8)
    ffn = NEURONS.get(layer)
    rows = {"q_proj": q, "k_proj": groups, "v_proj": groups, "up_proj": ffn}.get(name.split(".")[1], HIDDEN)
    columns = {"o_proj": q, "down_proj": ffn, "out_proj": inner}.get(name.split(".")[1], HIDDEN)
    return tensor[rows][:, columns]
