"""Run by ranks.py, once for each world size: a mixture of experts, filled, read and saved in every layout.

Arguments: folder of models, JSON list of cases, output folder. Rank 0 writes one result a case.
"""

import json

import numpy as np
from ranks import leave_layout
from workers import load_model, process_group, run_cases


def differing(source, expected):
    """The names of the tensors in which two sources differ, bit by bit."""
    from nemo_minitron.sources.tensors import whole

    return [
        name
        for name, shape in expected.architecture.shapes().items()
        if not np.array_equal(source.read(name, whole(shape)), expected.read(name, whole(shape)))
    ]


def fills_with_nan(chunks, teacher):
    """Whether a router with NaN, as a training that diverged would have it, is filled in without a refusal."""
    import types

    from nemo_minitron.errors import InputError
    from nemo_minitron.megatron.live import fill

    def read(name, index):
        raw = teacher.read(name, index)
        if name == "layers.1.router.weight":
            raw[..., -1] = 0x7FC00000
        return raw

    try:
        fill(chunks, types.SimpleNamespace(architecture=teacher.architecture, dtype=teacher.dtype, read=read))
    except InputError as error:
        return "'layers.1.router.weight' hold a number that is not finite" not in str(error)
    return True


def run_case(case, folder, out):
    """Fills a model in this layout from a folder, the folder's student through the plan, and both from
    checkpoints that this layout wrote."""
    import torch

    from nemo_minitron.artifacts import PrunePlan
    from nemo_minitron.hosts import host_of
    from nemo_minitron.megatron.live import LiveSource, fill
    from nemo_minitron.settings.layout import Layout
    from nemo_minitron.sources.checkpoint import CheckpointSource
    from nemo_minitron.sources.folder import HFSource

    layout = Layout(**case["layout"])
    teacher, student = HFSource(folder / "teacher"), HFSource(folder / "student")
    plan = PrunePlan.load(folder / "plan.json")
    chunks = load_model(folder / "teacher", layout=layout)
    live = LiveSource(chunks, teacher.architecture)
    cut = load_model(folder / "teacher", plan, layout=layout)
    result = {"filled": differing(live, teacher), "cut": differing(LiveSource(cut, plan.target), student)}
    fill(cut, live, plan)
    result["cut from live"] = differing(LiveSource(cut, plan.target), student)
    for kind in ("stacked", "one key a layer") if host_of().name == "nemo" else ():
        from checkpoints import save_checkpoint

        checkpoint = out / f"{case['name']}-{kind}"
        save_checkpoint(chunks, checkpoint, teacher.config, non_homogeneous_layers=kind != "stacked")
        result[f"saved, {kind}"] = differing(CheckpointSource(checkpoint), teacher)
        fill(cut, CheckpointSource(checkpoint), plan)
        result[f"cut from saved, {kind}"] = differing(LiveSource(cut, plan.target), student)
    result["filled with NaN"] = fills_with_nan(chunks, teacher)
    if layout.pp == 1:
        fill(chunks, teacher)
        tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
        found = {name: _logits(model, tokens) for name, model in (("teacher", chunks), ("student", cut))}
    leave_layout()
    if torch.distributed.get_rank() == 0:
        (out / f"{case['name']}.json").write_text(json.dumps(result))
        if layout.pp == 1:
            np.savez(out / f"{case['name']}.npz", **found)


def _logits(chunks, tokens):
    """fp32 [batch, sequence, vocabulary]; each data-parallel rank runs the whole batch."""
    import torch
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        local = chunks[0].eval()(tokens, positions, None)
        return gather_from_tensor_model_parallel_region(local)[..., :509].numpy()


def main():
    with process_group():
        run_cases(run_case)


if __name__ == "__main__":
    main()
