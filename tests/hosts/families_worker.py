"""One process: builds the models of the families' contract on the host; prints a line of JSON for each name.

Argument: an empty folder. A line has the largest difference from transformers' logits, or the sentence of
a refusal.
"""

import json
import sys
from pathlib import Path

from nemo_minitron.errors import InputError
from nemo_minitron.hosts import host_of

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}  # the test has 64 tokens
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
SCALED = {
    "llama-own of 3.1": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "qwen2-own by YaRN": {"rope_scaling": YARN},
    "mistral-other by YaRN": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 16}},
    # a range of frequencies whose ends are not whole numbers
    "arcee-own by YaRN": {
        "rope_scaling": YARN | {"mscale": 0.5, "truncate": False, "original_max_position_embeddings": 256}
    },
}


def main() -> None:
    import nemo_minitron.backend as backend

    backend.setup()
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "families")]
    import contract

    for name in [*contract.NAMES, *SCALED]:
        folder = contract.make(Path(sys.argv[1]) / name, name.split()[0], **SCALED.get(name, {}))
        try:
            print(json.dumps({"name": name, "error": error_of(folder)}), flush=True)
        except InputError as refusal:
            print(json.dumps({"name": name, "refused": str(refusal)}), flush=True)


def error_of(folder: Path) -> float:
    """Of 64 tokens, which is beyond every window of the contract. The logits of the model, and those that criteria of
    depth and distillation take from the last hidden states."""
    import torch
    from transformers import AutoModelForCausalLM

    from nemo_minitron.distillation.teacher import headless
    from nemo_minitron.importance.depth.head import Head
    from nemo_minitron.megatron.load import load
    from nemo_minitron.sources.open import open_source

    (model,) = load(open_source(folder), build=host_of().build)
    tokens = torch.arange(64).mul(37).remainder(509).view(1, -1)
    inputs = {"input_ids": tokens, "position_ids": torch.arange(64)[None], "attention_mask": None}
    states = []
    hook = model.decoder.final_layernorm.register_forward_pre_hook(lambda module, given: states.append(given[0]))
    with torch.no_grad():
        # transformers' attention by SDPA leaves a cap of the scores out
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        expected = AutoModelForCausalLM.from_pretrained(folder, **options)(tokens).logits
        found = [model.eval()(**inputs)]
        hook.remove()
        found.append(Head(model, 509).logits(states[0], torch.ones_like(tokens, dtype=torch.bool))[None])
        with headless(model) as head:
            found.append(head(model(**inputs)))
    assert expected.std() > 0.1
    return max((logits[..., :509] - expected).abs().max().item() for logits in found)


if __name__ == "__main__":
    main()
