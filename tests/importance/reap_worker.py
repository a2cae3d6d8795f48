"""Run by ranks.py, once for each world size: scores of Qwen3-MoE's experts in each layout.

Arguments: folder of pico models, JSON list of cases, output folder. Rank 0 writes the scores of a case.
"""

import numpy as np
from ranks import leave_layout
from workers import load_model, process_group, run_cases


def run_case(case, folder, out):
    import torch
    from layouts_worker import batches_of

    from nemo_minitron.importance import estimate
    from nemo_minitron.settings.layout import Layout

    chunks = load_model(folder / case["model"], layout=Layout(**case["layout"]))
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    found = {kind: estimate(chunks, batches_of(kind, tokens), criterion="l2,l2") for kind in case["kinds"]}
    leave_layout()
    if torch.distributed.get_rank() == 0:
        for kind, scores in found.items():
            scores.save(out / f"{case['name']}-{kind}.safetensors")


def main():
    with process_group():
        run_cases(run_case)


if __name__ == "__main__":
    main()
