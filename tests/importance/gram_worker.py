"""Run under torchrun, once for a world size: Gram matrices in every layout of that size.

Arguments: folder of pico models, JSON list of cases, output folder. Rank 0 writes one .npz a case.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
from depth_worker import own_batches
from ranks import leave_layout


def run_case(case, folder):
    """Every G of the model, gathered from the pipeline's stages; one layer at a time, and all at once."""
    import torch

    from nemo_minitron.importance.gram import gram, speaks, whole
    from nemo_minitron.job.settings.layout import Layout
    from nemo_minitron.nemo import load_model

    layout = Layout(**case["layout"])
    chunks = load_model(folder / case["model"], layout=layout)
    hooks = [len(m._forward_pre_hooks) for c in chunks for m in c.modules()]
    kind = "experts" if case["model"] == "mixture" else "down"
    grams, one = gram(chunks, own_batches(folder)), gram(chunks, own_batches(folder), [4], [kind])
    assert hooks == [len(m._forward_pre_hooks) for c in chunks for m in c.modules()]
    for name, g in grams.items():
        shards = layout.expert_tp if ".experts." in name else layout.tp
        assert (g.shape[0] * shards, g.dtype) == (g.shape[1], torch.float64)
    assert set(one) == {name for name in grams if name.startswith(f"layers.4.{kind}.")}
    assert all(torch.equal(g, grams[name]) for name, g in one.items())
    found = {name: (whole(grams, name), speaks(name)) for name in grams}
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, found)
    leave_layout()
    merged, speakers = {}, {}
    for part in everyone:
        for name, (g, speaking) in part.items():
            assert np.array_equal(merged.setdefault(name, g), g), f"ranks differ in {name}"
            speakers[name] = speakers.get(name, 0) + speaking
    assert set(speakers.values()) == {1}
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
