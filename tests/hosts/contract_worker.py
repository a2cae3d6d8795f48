"""One process of the contract: `contract_worker.py HOST FOLDER` builds and fills a pico model; prints its error."""

import sys

from nemo_minitron.hosts import host_of


def main() -> None:
    host = host_of()
    assert host.name == sys.argv[1]
    import nemo_minitron.backend as backend

    backend.setup()
    import torch
    from transformers import AutoModelForCausalLM

    from nemo_minitron.megatron.load import load
    from nemo_minitron.sources.open import open_source

    chunks = load(open_source(sys.argv[2]), build=host.build)
    tokens = torch.arange(64).mul(37).remainder(509).view(1, -1)
    expected = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)(tokens).logits
    with torch.no_grad():
        found = chunks[0].eval()(input_ids=tokens, position_ids=torch.arange(64)[None], attention_mask=None)
    print("error", (found[..., : expected.shape[-1]] - expected).abs().max().item())


if __name__ == "__main__":
    main()
