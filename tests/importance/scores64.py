"""Scores by the book: transformers in float64, every activation kept, numpy's own mean, norm, var and max."""

import numpy as np

AGGREGATE = {
    "mean": lambda v: np.abs(v).mean(0),
    "l2": lambda v: np.sqrt(np.square(v).sum(0)),
    "var": lambda v: v.var(0),
    "max": lambda v: np.abs(v).max(0),
}


def activations(folder, samples):
    """Statistic -> row -> sample -> float64 [positions, channels]; samples: lists of tokens, run one by one."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float64, attn_implementation="eager")
    found = {}

    def keep(statistic, row, part):
        def hook(module, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            value = part(given, output[0] if isinstance(output, tuple) else output)[0]
            found.setdefault(statistic, {}).setdefault(row, []).append(value.numpy())

        return hook

    for i, layer in enumerate(model.model.layers):
        watched = [
            (layer.mlp.down_proj, "ffn", i, lambda given, out: given),
            (getattr(layer.mlp, "gate_proj", layer.mlp.up_proj), "ffn_pre_activation", i, lambda given, out: out),
            (layer.mlp.down_proj, "mlp_output", i, lambda given, out: out),
            (layer.self_attn.o_proj, "head_channels", i, lambda given, out: given),
            (layer.self_attn.o_proj, "heads", i, lambda given, out: given.unflatten(-1, (-1, 8)).norm(dim=-1)),
            (layer.input_layernorm, "norms", 2 * i, lambda given, out: out),
            (layer.post_attention_layernorm, "norms", 2 * i + 1, lambda given, out: out),
            (layer, "stream_logs", i, lambda x, y: _parts(x.norm(dim=-1).log())),
            (layer, "layers", i, lambda x, y: 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1)[..., None]),
        ]
        for module, *what in watched:
            module.register_forward_hook(keep(*what), with_kwargs=True)
    last, count = 2 * len(model.model.layers), len(model.model.layers)
    behind = keep("stream_logs", count, lambda x, y: _parts(y.norm(dim=-1).log()))
    model.model.layers[-1].register_forward_hook(behind, with_kwargs=True)
    model.model.norm.register_forward_hook(keep("norms", last, lambda given, out: out), with_kwargs=True)
    with torch.no_grad():
        for sample in samples:
            model(torch.as_tensor(sample)[None])
    return found


def scores64(found, criterion):
    """Statistic -> float64 [rows, channels] of `activations`, batch,sequence as the paper writes it."""
    over_samples, over_sequence = (AGGREGATE[name] for name in criterion.split(","))
    scores = {}
    for statistic, rows in found.items():
        ordered = [rows[row] for row in sorted(rows)]
        if statistic == "layers":  # every token counts alike
            scores[statistic] = np.array([np.concatenate(samples).mean() for samples in ordered])
        elif statistic == "stream_logs":
            scores[statistic] = np.stack([np.concatenate(samples).mean(0) for samples in ordered])
        else:
            scores[statistic] = np.stack([over_samples(np.stack([over_sequence(s) for s in r])) for r in ordered])
    if "stream_logs" in scores:
        scores["stream"] = scores["stream_logs"][:, 0] - scores["stream_logs"][:, 1]
    return scores | {"hidden": scores["norms"].sum(0)}


def _parts(log):
    """[positions] -> [positions, 2], the parts above and below 0, as numbers that are not negative."""
    import torch

    return torch.stack([log.clamp(min=0), (-log).clamp(min=0)], -1)
