"""Gram matrices by the book: transformers in float64, every counted position's input of `down` and `o`."""

from pathlib import Path
from typing import Any

import numpy as np
from pico import raw_tensors


def grams64(folder: str | Path, tokens: Any, mask: Any = None) -> dict[str, np.ndarray]:
    """Canonical name -> float64 [C, C]; `tokens` int64 [rows, positions], `mask` bool like them (all unless given).

    Of an expert (Mixtral): of the tokens that its router sends it, times the router's probabilities.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    if hasattr(model, "set_experts_implementation"):  # transformers 5: its grouped product has no float64
        model.set_experts_implementation("eager")
    raw = {name: torch.from_numpy(bits.view(np.float32)).double() for name, bits in raw_tensors(folder).items()}
    top_k = getattr(model.config, "num_experts_per_tok", 0)
    tokens = torch.as_tensor(tokens)
    counted = torch.ones_like(tokens, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    found = {}

    def keep(name):
        def hook(module, args):
            x = args[0][counted].numpy()
            found[name] = x.T @ x

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(keep(f"layers.{i}.o.weight"))
        if not top_k:
            layer.mlp.down_proj.register_forward_pre_hook(keep(f"layers.{i}.down.weight"))
            continue
        block = layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp  # transformers 4 or 5
        block.register_forward_pre_hook(
            lambda block, args, i=i: found.update(_of_experts(raw, args[0][counted], f"layers.{i}.", top_k))
        )
    with torch.no_grad():
        model(tokens)
    return found


def _of_experts(raw, hidden, prefix, top_k):
    import torch

    block = f"model.{prefix}block_sparse_moe."
    router = raw[f"{block}gate.weight"]
    chosen = (hidden @ router.t()).softmax(-1).topk(top_k)
    shares = chosen.values / chosen.values.sum(-1, keepdim=True)
    found = {}
    for e in range(len(router)):
        came, place = torch.where(chosen.indices == e)
        gate, up = (raw[f"{block}experts.{e}.{name}.weight"].t() for name in ("w1", "w3"))
        inner = torch.nn.functional.silu(hidden[came] @ gate) * (hidden[came] @ up)
        x = (inner * shares[came, place, None]).numpy()
        found[f"{prefix}experts.{e}.down.weight"] = x.T @ x
    return found
