"""Gram matrices by the book: transformers in float64, every counted position's input of `down` and `o`."""

from pathlib import Path
from typing import Any

import numpy as np


def grams64(folder: str | Path, tokens: Any, mask: Any = None) -> dict[str, np.ndarray]:
    """Canonical name -> float64 [C, C]; `tokens` int64 [rows, positions], `mask` bool like them (all unless given).

    Of an expert (Mixtral): of the tokens that its router sends it, times the router's probabilities.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float64)
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
        if hasattr(layer, "mlp"):
            layer.mlp.down_proj.register_forward_pre_hook(keep(f"layers.{i}.down.weight"))
        else:
            layer.block_sparse_moe.register_forward_pre_hook(
                lambda block, args, i=i: found.update(_of_experts(block, args[0][counted], f"layers.{i}."))
            )
    with torch.no_grad():
        model(tokens)
    return found


def _of_experts(block, hidden, prefix):
    import torch

    chosen = block.gate(hidden).softmax(-1).topk(block.top_k)
    shares = chosen.values / chosen.values.sum(-1, keepdim=True)
    found = {}
    for e, expert in enumerate(block.experts):
        came, place = torch.where(chosen.indices == e)
        inner = expert.act_fn(expert.w1(hidden[came])) * expert.w3(hidden[came])
        x = (inner * shares[came, place, None]).numpy()
        found[f"{prefix}experts.{e}.down.weight"] = x.T @ x
    return found
