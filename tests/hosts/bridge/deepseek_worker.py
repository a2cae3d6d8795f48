"""Run by ranks.py in two processes: scores, gradients and checkpoint of a DeepSeek or a Qwen2-MoE in each layout.

Arguments: folder of models, JSON list of cases, output folder. Rank 0 writes one result a case.
"""

import json

import numpy as np
from gpt_oss_worker import scores_of
from ranks import leave_layout
from workers import load_model, process_group, run_cases

KEYS = (
    "first_k_dense_replace", "n_shared_experts", "routed_scaling_factor", "kv_lora_rank", "q_lora_rank",
    "qk_nope_head_dim", "rope_scaling", "n_group", "topk_group", "norm_topk_prob", "rms_norm_eps", "rope_theta",
)  # fmt: skip


def checkpointed(chunks, folder, out, config, keys):
    """What the checkpoint that this layout writes has otherwise than the folder: tensors, their dtypes, and keys."""
    from contract_worker import differing

    from nemo_minitron.families import from_hf
    from nemo_minitron.hosts.bridge.students import save_chunks
    from nemo_minitron.sources.checkpoint import CheckpointSource
    from nemo_minitron.sources.folder import HFSource

    save_chunks(chunks, out, from_hf(folder).vocab_size)
    source, expected = CheckpointSource(out), HFSource(folder)
    biases = [name for name in expected.architecture.shapes() if name.endswith("expert_bias")]
    wrong = [name for name in biases if source.dtype(name) != "F32"]
    return wrong + differing(source, expected) + [name for name in keys if source.config[name] != config[name]]


def run_case(case, folder, out):
    import torch

    from nemo_minitron.backend.wrappers import unwrap
    from nemo_minitron.importance.forward import architecture_of
    from nemo_minitron.settings.layout import Layout
    from nemo_minitron.sources.folder import HFSource

    layout, found = Layout(**case["layout"]), {}
    expected = HFSource(folder / case["model"])
    chunks = load_model(folder / case["model"], layout=layout)
    assert architecture_of(unwrap(chunks[0])) == expected.architecture
    for method in ("activation", "taylor"):
        found |= scores_of(chunks, expected.architecture, folder, layout, method)
    made, keys = out / f"{case['name']}-checkpoint", case.get("keys", KEYS)
    wrong = checkpointed(chunks, folder / case["model"], made, expected.config, keys)
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
