"""Run under torchrun, once for a world size: Gram matrices in every layout of that size, on bare Megatron.

Arguments: folder of pico models, JSON list of cases, output folder. Rank 0 writes one .npz a case.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
from depth_worker import build, own_batches
from ranks import leave_layout


def run_case(case, folder):
    """Every G of the model, gathered from the pipeline's stages; one layer at a time, and all at once."""
    import torch
    from megatron.core import parallel_state

    from nemo_minitron.importance.gram import gram, whole
    from nemo_minitron.nemo.live import fill
    from nemo_minitron.pruning.folder import HFSource

    source = HFSource(folder / case["model"])
    chunks = build(source.architecture, **{k: v for k, v in case["layout"].items() if k != "dp"})
    fill(chunks, source)
    hooks = [len(m._forward_pre_hooks) for c in chunks for m in c.modules()]
    grams, one = gram(chunks, own_batches(folder)), gram(chunks, own_batches(folder), [4], ["down"])
    assert hooks == [len(m._forward_pre_hooks) for c in chunks for m in c.modules()]
    tp = parallel_state.get_tensor_model_parallel_world_size()
    assert all(g.shape[0] * tp == g.shape[1] and g.dtype == torch.float64 for g in grams.values())
    assert set(one) == {"layers.4.down.weight"} & set(grams)
    assert all(torch.equal(g, grams[name]) for name, g in one.items())
    found = {name: whole(grams, name) for name in grams}
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, found)
    leave_layout()
    merged = {}
    for part in everyone:
        for name, g in part.items():
            assert np.array_equal(merged.setdefault(name, g), g), f"ranks differ in {name}"
    return merged


def main():
    folder, cases, out = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    import torch

    import nemo_minitron.backend as backend

    backend.setup()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    for case in cases:
        found = run_case(case, folder)
        if torch.distributed.get_rank() == 0:
            np.savez(out / f"{case['name']}.npz", **found)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
