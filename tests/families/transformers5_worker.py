"""Run under transformers 5: each model folder's logits, and its config as transformers 5 writes it.

Arguments: the folder of transformers 5, then the folder whose model folders are loaded. Leaves `logits.npz`, and in
each model folder `written5/config.json`.
"""

import sys
from pathlib import Path


def main(home, work):
    sys.path.insert(0, home)
    import numpy as np
    import torch
    import transformers

    assert transformers.__version__.startswith("5."), transformers.__version__
    ids = torch.arange(3, 3 + 48).reshape(2, 24)
    logits = {}
    for folder in sorted(path.parent for path in Path(work).glob("*/config.json")):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            attn_implementation="eager",  # SDPA leaves a cap of the scores out
        )
        assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"], (folder, info)
        with torch.inference_mode():
            logits[folder.name] = model.eval()(ids).logits.numpy()
        model.config.save_pretrained(folder / "written5")
    np.savez(Path(work) / "logits.npz", **logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
