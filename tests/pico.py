"""Random pico models as Hugging Face folders: small enough for every test, odd enough to catch mix-ups.

No two sizes agree (hidden 48, q rows 48 is the one exception that real models have too), the vocabulary is
prime, RoPE's base and the norms' epsilon are off their defaults, and norms and biases are random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 509,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rope_theta": 5000.0,
    "rms_norm_eps": 3e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def pico_llama(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Llama; `overrides` are fields of its config. Returns the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _write(LlamaForCausalLM, LlamaConfig(**{**SIZES, **overrides}), Path(folder), dtype, seed)


def pico_mistral(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Mistral with a sliding window of 64; `overrides` as in `pico_llama`."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**{**SIZES, "sliding_window": 64, **overrides})
    return _write(MistralForCausalLM, config, Path(folder), dtype, seed)


def pico_ministral(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Ministral with a sliding window of 64; `overrides`, such as `layer_types`, as in `pico_llama`."""
    from transformers import MinistralConfig, MinistralForCausalLM

    config = MinistralConfig(**{**SIZES, "sliding_window": 64, **overrides})
    return _write(MinistralForCausalLM, config, Path(folder), dtype, seed)


def pico_mixtral(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Mixtral of four experts, two for a token; `overrides` as in `pico_llama`."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {**SIZES, "intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2}
    return _write(MixtralForCausalLM, MixtralConfig(**{**sizes, **overrides}), Path(folder), dtype, seed)


def pico_qwen2(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Qwen2, with its biases; `overrides` as in `pico_llama`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _write(Qwen2ForCausalLM, Qwen2Config(**{**SIZES, **overrides}), Path(folder), dtype, seed)


def pico_qwen3(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Qwen3, with norms of queries and keys; `overrides` as in `pico_llama`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _write(Qwen3ForCausalLM, Qwen3Config(**{**SIZES, **overrides}), Path(folder), dtype, seed)


def pico_qwen3_moe(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Qwen3-MoE of four experts, two for a token, whose probabilities are normalized; `overrides` as in
    `pico_llama`."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {**SIZES, "moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return _write(Qwen3MoeForCausalLM, Qwen3MoeConfig(**{**sizes, **overrides}), Path(folder), dtype, seed)


def pico_nemotron(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Nemotron that rotates three quarters of a head; `overrides` as in `pico_llama`."""
    from transformers import NemotronConfig, NemotronForCausalLM

    sizes = {"norm_eps" if name == "rms_norm_eps" else name: value for name, value in SIZES.items()}
    config = NemotronConfig(**{**sizes, "partial_rotary_factor": 0.75, **overrides})
    return _write(NemotronForCausalLM, config, Path(folder), dtype, seed)


def pico_phi3(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Phi-3 with a sliding window of 64; `overrides` as in `pico_llama`."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(**{**SIZES, "pad_token_id": None, "sliding_window": 64, **overrides})
    return _write(Phi3ForCausalLM, config, Path(folder), dtype, seed)


def pico_smollm3(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random SmolLM3 whose every third layer has no rotary positions; `overrides` as in `pico_llama`."""
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    config = SmolLM3Config(**{**SIZES, "pad_token_id": None, "no_rope_layer_interval": 3, **overrides})
    return _write(SmolLM3ForCausalLM, config, Path(folder), dtype, seed)


def pico_granite(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Granite with four multipliers, none a power of two; `overrides` as in `pico_llama`."""
    from transformers import GraniteConfig, GraniteForCausalLM

    multipliers = {"embedding_multiplier": 12.0, "logits_scaling": 0.3, "residual_multiplier": 0.22}
    config = GraniteConfig(**{**SIZES, **multipliers, "attention_multiplier": 0.21, **overrides})
    return _write(GraniteForCausalLM, config, Path(folder), dtype, seed)


def pico_arcee(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Arcee, whose MLP has two matrices and squared ReLU; `overrides` as in `pico_llama`."""
    from transformers import ArceeConfig, ArceeForCausalLM

    return _write(ArceeForCausalLM, ArceeConfig(**{**SIZES, **overrides}), Path(folder), dtype, seed)


def pico_seed_oss(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Seed-OSS, with biases of q, k and v alone; `overrides` as in `pico_llama`."""
    from transformers import SeedOssConfig, SeedOssForCausalLM

    return _write(SeedOssForCausalLM, SeedOssConfig(**{**SIZES, **overrides}), Path(folder), dtype, seed)


def _write(model_class: Any, config: Any, folder: Path, dtype: str, seed: int) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Norms of 1 and biases of 0 would hide a tensor that is never read.
                spread, mean = (0.2, 1.0) if "norm" in name else (0.06, 0.0)
                # Nemotron stores its norms' weights less 1; biases lie around 0.
                mean = 0.0 if config.model_type == "nemotron" or name.endswith("bias") else mean
                # Routers that prefer some experts clearly, so that routing wrongly shows.
                spread = 0.5 if name.endswith(("block_sparse_moe.gate.weight", "mlp.gate.weight")) else spread
                parameter.normal_(mean, spread)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def save_tensors(folder: str | Path, tensors: dict[str, Any], *, shards: int = 1) -> None:
    """Replaces a folder's weights by numpy arrays, in one file or several with an index."""
    import json

    from safetensors.numpy import save_file

    folder = Path(folder)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[k::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def raw_tensors(folder: str | Path) -> dict[str, Any]:
    """Hugging Face name -> raw bits as a numpy array, of a folder's safetensors, read by its own library."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    unsigned = {2: np.uint16, 4: np.uint32, 8: np.uint64}
    return {
        name: tensor.view(bits[tensor.element_size()]).numpy().view(unsigned[tensor.element_size()])
        for file in sorted(Path(folder).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
