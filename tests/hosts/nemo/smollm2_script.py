"""Run by test_smollm2.py in a process of its own. Arguments: the model's folder, a scratch folder."""

import json
import sys
from pathlib import Path

from nemo_importer import import_from_hf


def main(folder: Path, scratch: Path) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_minitron.megatron.live import LiveSource, named_parameters
    from nemo_minitron.nemo import load_model
    from nemo_minitron.pruning import HFSource
    from nemo_minitron.sources.checkpoint import CheckpointSource
    from nemo_minitron.sources.tensors import whole

    stored = HFSource(folder)
    text = " ".join((Path(__file__).parents[3] / "README.md").read_text().split())
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][:, :384]
    chunks = load_model(folder, precision="fp32")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)(tokens).logits
        ours = chunks[0].eval()(tokens, torch.arange(tokens.shape[1])[None], None)
    count = sum(parameter.numel() for _, parameter in named_parameters(chunks))
    live = LiveSource(load_model(folder, precision="bf16"), stored.architecture)

    shapes = stored.architecture.shapes()

    def differing(source) -> list:
        blocks = ((name, whole(shape)) for name, shape in shapes.items())
        return [name for name, at in blocks if not np.array_equal(source.read(name, at), stored.read(name, at))]

    round_trip = differing(live)  # before NeMo's importer takes the process groups down
    imported = scratch / "imported"
    import_from_hf(folder, imported)
    importer = CheckpointSource(imported)
    result = {
        "logits": (ours - theirs).abs().max().item(),
        "next_tokens_differ": int((ours.argmax(-1) != theirs.argmax(-1)).sum()),
        "parameters": count,
        "tensors": len(shapes),
        "round_trip_differs": round_trip,
        "differs_from_importer": differing(importer),
    }
    print("RESULT" + json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
