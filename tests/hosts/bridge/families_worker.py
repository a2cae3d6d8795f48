"""Run by ranks.py in two processes: every family's model and its student on Megatron-Bridge, split by tensors and by
layers.

Arguments: folder of models, JSON list of cases, output folder. Rank 0 writes one result a case.
"""

import json
import sys
from pathlib import Path

import numpy as np
from ranks import leave_layout
from workers import load_model, process_group, run_cases

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))


def run_case(case, folder, out):
    import torch
    from contract_worker import differing, logits, misread

    from nemo_minitron.artifacts import PrunePlan
    from nemo_minitron.megatron.live import LiveSource
    from nemo_minitron.settings.layout import Layout
    from nemo_minitron.sources.folder import HFSource

    name, layout, result, found = case["family"], Layout(**case["layout"]), {}, {}
    plan = PrunePlan.load(folder / f"{name}-plan.json")
    for model, cut in (("teacher", None), ("student", plan)):
        expected = HFSource(folder / f"{name}-{model}")
        chunks = load_model(folder / f"{name}-teacher", cut, layout=layout)
        result[model] = differing(LiveSource(chunks, expected.architecture), expected)
        result[model] += misread(chunks, expected)
        if layout.pp == 1:
            found[model] = logits(chunks, folder)
    leave_layout()
    if torch.distributed.get_rank() == 0:
        (out / f"{case['name']}.json").write_text(json.dumps(result))
        np.savez(out / f"{case['name']}.npz", **found)


def main():
    with process_group():
        run_cases(run_case)


if __name__ == "__main__":
    main()
