"""NVIDIA Model Optimizer 0.37's `mcore_minitron`, the tool to compare with, on models that both can run.

It supports Transformer Engine's layers and Megatron's local ones. Without Transformer Engine only the local spec with
LayerNorm remains, and a final norm of torch's own class. After `nemo_minitron.backend.setup()` nothing else has to be
redirected for its width axes. Importing it patches torch and Megatron: give it a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

DIVISORS = {"hidden_size": 1, "ffn_hidden_size": 1, "num_heads_per_group": 1, "num_query_groups": 1}


def one_process() -> None:
    """A layout of one process over gloo, for models that no launcher starts. Call `backend.setup()` first."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)


def local_model(*, vocab_size: int, sequence_length: int, seed: int, **sizes: int) -> Any:
    """A random fp32 GPTModel of Megatron's local layers: LayerNorm, RoPE, SwiGLU, no biases but the norms'.

    `sizes` are fields of Megatron's TransformerConfig. Norms are drawn around 1, so that no two channels tie.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    config = TransformerConfig(
        normalization="LayerNorm", add_bias_linear=False, gated_linear_unit=True, bias_activation_fusion=False,
        activation_func=torch.nn.functional.silu, hidden_dropout=0.0, attention_dropout=0.0, **sizes,
    )  # fmt: skip
    layers = [get_gpt_layer_local_spec(normalization="LayerNorm")] * config.num_layers
    spec = TransformerBlockSubmodules(layers, layer_norm=WrappedTorchNorm)
    model = GPTModel(config, spec, vocab_size, sequence_length, position_embedding_type="rope")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread, mean = (0.2, float(name.endswith("weight"))) if "norm" in name else (0.06, 0.0)
            parameter.normal_(mean, spread, generator=generator)
    return model.eval()


@torch.no_grad()
def forward(model: Any, batches: Iterable[Tensor]) -> None:
    """The plain loop: each batch [B, S] once through the model, its output dropped."""
    for tokens in batches:
        model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


def convert(model: Any) -> Any:
    """Turns the model, in place, into Model Optimizer's dynamic one, with its hooks; any width is legal."""
    import modelopt.torch.nas as nas
    from modelopt.torch.prune.plugins import mcore_minitron
    from modelopt.torch.prune.pruning import PruneModeRegistry

    rules = {"megatron.core.models.gpt.GPTModel": {f"{name}_divisor": value for name, value in DIVISORS.items()}}
    config = mcore_minitron.MCoreMinitronConfig(**rules).model_dump()
    return nas.convert(model, [("mcore_minitron", config)], registry=PruneModeRegistry)


def scores(converted: Any, batches: int) -> dict[str, np.ndarray]:
    """The scores that its hooks have gathered: ffn, heads, query_groups [layers, units], hidden [hidden], layers
    [layers]."""
    layers = converted.decoder.layers
    rows = {
        "ffn": [layer.mlp._estimate_importance() for layer in layers],
        "heads": [layer.self_attention._estimate_all_head_importance() for layer in layers],
        "query_groups": [layer.self_attention._estimate_query_group_importance() for layer in layers],
    }
    arrays = {name: torch.stack(row).numpy() for name, row in rows.items()}
    arrays["hidden"] = converted._estimate_hidden_size_importance().numpy()
    arrays["layers"] = np.array([layer._scores for layer in layers]) / batches  # it adds up the means of the batches
    return arrays


def prune(model: Any, batches: Iterable[Tensor], **sizes: int) -> Any:
    """The model pruned by Model Optimizer, in place, to `sizes` (Megatron's field names)."""
    import modelopt.torch.nas as nas

    config = {"forward_loop": lambda converted: forward(converted, batches)}
    student, _ = nas.search(convert(model), {"export_config": sizes}, None, config=config)
    return student


def kept(teacher: Tensor, student: Tensor) -> list[int]:
    """The sorted numbers of the teacher's rows [n, m] that are the student's rows [k, m], found by their values
    alone."""
    same = (student[:, None] == teacher[None]).all(-1)
    assert (same.sum(1) == 1).all(), "a row of the student is not one row of the teacher"
    return sorted(same.int().argmax(1).tolist())
