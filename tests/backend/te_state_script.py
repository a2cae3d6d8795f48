"""A checkpoint that Megatron saves with Transformer Engine's FP8 state in it, loaded by Megatron into the twin.

`python te_state_script.py FOLDER OUT.json`: the state is what Transformer Engine 2 gives out (`_encode_extra_state` in
Megatron's extensions): a uint8 tensor, a pickle of scales and histories; the class that it names is not there.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import pickle
import sys
from pathlib import Path

import torch

import nemo_minitron.backend as backend


def fp8_state(module):
    rows = module.weight.shape[0]  # something of the module's own
    state = {"scale_fwd": torch.full((3,), float(rows)), "amax_history_fwd": torch.ones(1024, 3)}
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def main(folder: Path, out: Path) -> None:
    backend.setup()
    import bare_models

    from nemo_minitron.backend.reference import ColumnLinear, RowLinear
    from nemo_minitron.sources.checkpoint import read_metadata

    store = torch.distributed.HashStore()
    wait = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=wait)
    bare_models.start()
    theirs = bare_models.build("llama")
    for linear in (ColumnLinear, RowLinear):
        linear.get_extra_state = fp8_state
    bare_models.save_bare(theirs, folder)
    for linear in (ColumnLinear, RowLinear):
        del linear.get_extra_state
    ours = bare_models.build("llama")
    with torch.no_grad():
        for parameter in ours[0].parameters():
            parameter.zero_()
    bare_models.load_bare(ours, folder)
    wanted = dict(theirs[0].named_parameters())
    same = {name: torch.equal(parameter, wanted[name]) for name, parameter in ours[0].named_parameters()}
    objects = [key for key in read_metadata(folder).state_dict_metadata if "_extra_state" in key]
    out.write_text(json.dumps({"same": same, "objects": objects}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)
