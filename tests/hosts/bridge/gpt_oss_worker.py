"""Run by ranks.py in two processes: gpt-oss's scores, gradients, re-fitted matrices and checkpoint in each layout.

Arguments: folder of models, JSON list of cases, output folder. Rank 0 writes one result a case.
"""

import json

import numpy as np
from ranks import leave_layout
from workers import load_model, process_group, run_cases


def scores_of(chunks, architecture, folder, layout, method):
    """Scores of the four samples; each data-parallel rank takes its own."""
    import torch

    from nemo_minitron.importance import estimate

    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    rank = torch.distributed.get_rank() if layout.dp > 1 else 0
    found = estimate(chunks, [tokens[rank :: layout.dp]], criterion="l2,mean", architecture=architecture, method=method)
    return {f"{method}-{name}": tensor for name, tensor in found.tensors.items()}


def checkpointed(chunks, folder, out, config):
    """The tensors in which the checkpoint that this layout writes is not the folder."""
    from contract_worker import differing

    from nemo_minitron.families import from_hf
    from nemo_minitron.hosts.bridge.students import save_chunks
    from nemo_minitron.sources.checkpoint import CheckpointSource
    from nemo_minitron.sources.folder import HFSource

    save_chunks(chunks, out, from_hf(folder).vocab_size)
    source = CheckpointSource(out)
    return differing(source, HFSource(folder)) + [
        name
        for name in ("layer_types", "rope_scaling", "sliding_window", "num_experts_per_tok", "rms_norm_eps")
        if source.config[name] != config[name]
    ]


def run_case(case, folder, out):
    import torch

    from nemo_minitron.settings.layout import Layout
    from nemo_minitron.sources.folder import HFSource

    layout, found = Layout(**case["layout"]), {}
    expected = HFSource(folder / "teacher")
    chunks = load_model(folder / "teacher", layout=layout)
    for method in ("activation", "taylor"):
        found |= scores_of(chunks, expected.architecture, folder, layout, method)
    wrong = checkpointed(chunks, folder / "teacher", out / f"{case['name']}-checkpoint", expected.config)
    leave_layout()
    if torch.distributed.get_rank() == 0:
        (out / f"{case['name']}.json").write_text(json.dumps(wrong))
        np.savez(out / f"{case['name']}.npz", **found)


def main():
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
    with process_group():
        from nemo_minitron.hosts.bridge.load import load_training

        load_training()
        run_cases(run_case)


if __name__ == "__main__":
    main()
