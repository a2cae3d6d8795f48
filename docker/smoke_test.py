"""Scores and cuts a random Llama of two layers with this machine's host and Megatron, in a temporary folder."""

import tempfile
from pathlib import Path

import nemo_minitron.backend as backend

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def main() -> None:
    """Raises if any step from a Hugging Face folder to its student fails."""
    backend.setup()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemo_minitron.families import FAMILIES
    from nemo_minitron.hosts import host_of
    from nemo_minitron.importance import estimate
    from nemo_minitron.megatron.load import load
    from nemo_minitron.pruning import prune
    from nemo_minitron.search import plan
    from nemo_minitron.sources.open import open_source

    with tempfile.TemporaryDirectory() as folder:
        teacher, student = Path(folder, "teacher"), Path(folder, "student")
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(teacher)
        model = load(open_source(teacher), build=host_of().build)
        batch = torch.arange(64, device=torch.cuda.current_device()).reshape(2, 32)
        scores = estimate(model, [batch])
        prune(teacher, plan(scores, keep={"ffn": 48, "layers": 1}), student)
        parameters = LlamaForCausalLM.from_pretrained(student).num_parameters()
    families = ", ".join(family.model_type for family in FAMILIES)
    print(f"scored and cut to {parameters:,} parameters; host: {host_of().name}; families: {families}")


if __name__ == "__main__":
    main()
