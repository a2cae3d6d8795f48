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


def pico_qwen2_moe(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Qwen2-MoE of four experts, two for a token, beside a shared one with a gate that differs clearly
    from token to token; `overrides` as in `pico_llama`."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {**SIZES, "moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen2MoeConfig(**{**sizes, "shared_expert_intermediate_size": 72, **overrides})
    return _write(Qwen2MoeForCausalLM, config, Path(folder), dtype, seed)


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


def pico_gpt_oss(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random gpt-oss of four experts, two for a token, with a window of 64 in the even layers and positions of
    YaRN beyond 16 tokens; `overrides` as in `pico_llama`. Sinks and biases are large enough to show."""
    from transformers import GptOssConfig, GptOssForCausalLM

    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "truncate": False}
    sizes = {**SIZES, "intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}
    sizes |= {"rope_scaling": yarn | {"beta_fast": 32.0, "beta_slow": 1.0}}
    return _write(GptOssForCausalLM, GptOssConfig(**{**sizes, **overrides}), Path(folder), dtype, seed)


def pico_deepseek_v2(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random DeepSeek V2 whose first layer is dense, with queries of hidden states and two shared experts;
    `overrides` as in `pico_llama`."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    own = {"q_lora_rank": None, "routed_scaling_factor": 1.3, "n_group": 1, "topk_group": 1}
    config = DeepseekV2Config(**_latent_sizes(own | overrides))
    return _write(DeepseekV2ForCausalLM, config, Path(folder), dtype, seed)


def pico_deepseek_v3(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random DeepSeek V3 whose first layer is dense, with queries of a latent, two shared experts and biases
    that change which experts are chosen; `overrides` as in `pico_llama`."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    own = {"q_lora_rank": 20, "routed_scaling_factor": 2.4, "n_group": 1, "topk_group": 1}
    config = DeepseekV3Config(**_latent_sizes(own | overrides))
    return _write(DeepseekV3ForCausalLM, config, Path(folder), dtype, seed)


def _latent_sizes(own: dict[str, Any]) -> dict[str, Any]:
    """Sizes of a DeepSeek: a head's channels are 6 and 4 rotary ones, its value's are 7; each head has its own key."""
    sizes = SIZES | {"kv_lora_rank": 18, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 7}
    sizes |= {"first_k_dense_replace": 1, "moe_intermediate_size": 40, "n_routed_experts": 4, "n_shared_experts": 2}
    sizes |= {"num_experts_per_tok": 2} | own
    sizes.pop("head_dim")
    return sizes | {"num_key_value_heads": sizes["num_attention_heads"]}


def pico_gemma2(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Gemma 2 with caps that bend its scores and logits, and a window of 8 in every other layer;
    `overrides` as in `pico_llama`."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    own = {"attn_logit_softcapping": 0.9, "final_logit_softcapping": 2.5, "query_pre_attn_scalar": 11}
    config = Gemma2Config(**{**SIZES, **own, "pad_token_id": None, "sliding_window": 8, **overrides})
    return _write(Gemma2ForCausalLM, config, Path(folder), dtype, seed)


def pico_gemma3_text(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Gemma 3 with two rotary bases, and a window of 8 in two of three layers; `overrides` as in
    `pico_llama`."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    own = {"query_pre_attn_scalar": 11, "rope_local_base_freq": 300.0, "sliding_window_pattern": 3}
    config = Gemma3TextConfig(**{**SIZES, **own, "pad_token_id": None, "sliding_window": 8, **overrides})
    return _write(Gemma3ForCausalLM, config, Path(folder), dtype, seed)


def pico_arcee(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Arcee, whose MLP has two matrices and squared ReLU; `overrides` as in `pico_llama`."""
    from transformers import ArceeConfig, ArceeForCausalLM

    return _write(ArceeForCausalLM, ArceeConfig(**{**SIZES, **overrides}), Path(folder), dtype, seed)


def pico_seed_oss(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Seed-OSS, with biases of q, k and v alone; `overrides` as in `pico_llama`."""
    from transformers import SeedOssConfig, SeedOssForCausalLM

    return _write(SeedOssForCausalLM, SeedOssConfig(**{**SIZES, **overrides}), Path(folder), dtype, seed)


def pico_nemotron_h(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random Nemotron-H (transformers 5 has it) with two groups of Mamba heads; `overrides` as in
    `pico_llama`."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    left_out = ("rms_norm_eps", "num_hidden_layers", "rope_theta")
    sizes = {name: value for name, value in SIZES.items() if name not in left_out}
    mamba = {"mamba_num_heads": 8, "mamba_head_dim": 6, "n_groups": 2, "ssm_state_size": 5, "chunk_size": 16}
    config = NemotronHConfig(**{**sizes, **mamba, "hybrid_override_pattern": "M-M*-M", **overrides})
    return _write(NemotronHForCausalLM, config, Path(folder), dtype, seed)


def _write(model_class: Any, config: Any, folder: Path, dtype: str, seed: int) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Norms of 1 and biases of 0 would hide a tensor that is never read.
                spread, mean = (0.2, 1.0) if "norm" in name else (0.06, 0.0)
                # Nemotron and Gemma store their norms' weights less 1; biases lie around 0.
                less_one = config.model_type.startswith(("nemotron", "gemma")) and config.model_type != "nemotron_h"
                mean = 0.0 if less_one or name.endswith("bias") else mean
                # Routers that prefer some experts clearly, so that routing wrongly shows.
                # A Mamba head's own numbers: decays that differ, steps of about one, and x added to what it reads.
                spread, mean = {"A_log": (0.5, 0.5), "D": (0.3, 1.0)}.get(name.rpartition(".")[2], (spread, mean))
                routers = ("block_sparse_moe.gate.weight", "mlp.gate.weight", "mlp.router.weight", "mlp.router.bias")
                routers += ("mlp.shared_expert_gate.weight",)
                spread = 0.5 if name.endswith((*routers, ".sinks")) else spread
                parameter.normal_(mean, spread)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # large enough to change what is chosen
                buffer.normal_(0.0, 0.2)
    biases = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("_correction_bias")}
    model.to(getattr(torch, dtype))
    for name, buffer in biases.items():  # fp32, as transformers 5 keeps them
        model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = buffer
    model.save_pretrained(folder)
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


def wider(folder: str | Path, out: str | Path, rows: int) -> Path:
    """A copy of a folder whose vocabulary has `rows` rows; the new ones are large, so that reading them shows."""
    import json
    import shutil

    import numpy as np
    from safetensors.numpy import load_file

    shutil.copytree(folder, out)
    config = json.loads((Path(out) / "config.json").read_text())
    tensors = load_file(Path(out) / "model.safetensors")
    for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        more = np.full((rows - config["vocab_size"], tensors[name].shape[1]), 3.0, tensors[name].dtype)
        tensors[name] = np.concatenate([tensors[name], more])
    save_tensors(out, tensors)
    (Path(out) / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    return Path(out)


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
