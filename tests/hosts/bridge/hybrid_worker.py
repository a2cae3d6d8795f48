"""Run by ranks.py in two processes: a Mamba hybrid and its student on Megatron-Bridge, in each of the cases' layouts.

Arguments: folder of models, JSON list of cases, output folder. Rank 0 writes one result a case.
"""

import json
import sys
from pathlib import Path

import numpy as np
from ranks import leave_layout
from workers import load_model, process_group, run_cases

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))

CRITERION = "l2,mean"


def scores_of(chunks, architecture, folder, layout, method):
    """Scores of the four samples; each data-parallel rank takes its own."""
    import torch

    from nemo_minitron.importance import estimate

    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    rank = torch.distributed.get_rank() if layout.dp > 1 else 0
    found = estimate(chunks, [tokens[rank :: layout.dp]], criterion=CRITERION, architecture=architecture, method=method)
    precision = "" if chunks[0].config.params_dtype == torch.float32 else "bf16 "
    return {f"{precision}{method}-{name}": tensor for name, tensor in found.tensors.items()}


def packed_scores(chunks, architecture, folder, layout, whole):
    """Scores of samples of 10 and 14 tokens, each two in a packed row, or each alone."""
    import torch

    from nemo_minitron.importance import estimate

    rank, tokens = torch.distributed.get_rank() if layout.dp > 1 else 0, np.load(folder / "tokens.npy")
    rows = torch.from_numpy(tokens[rank :: layout.dp]).split(1)
    packed = [{"tokens": row, "cu_seqlens": torch.tensor([[0, 10, 24]])} for row in rows]
    alone = [sample for row in rows for sample in row.split([10, 14], dim=1)]
    found = estimate(chunks, alone if whole else packed, criterion=CRITERION, architecture=architecture)
    return {f"{'alone' if whole else 'packed'} {name}": tensor for name, tensor in found.tensors.items()}


def shorter_scores(folder, layout):
    """Scores of the teacher without its last layer: then no Mamba and no attention layer is the last one."""
    from nemo_minitron.families import from_hf
    from nemo_minitron.search import random_plan

    cut = random_plan(from_hf(folder / "teacher"), keep={"layers": [0, 1, 2, 3, 4]})
    chunks = load_model(folder / "teacher", cut, layout=layout)
    found = scores_of(chunks, cut.target, folder, layout, "activation")
    return {f"shorter {name}": score for name, score in found.items()}


def grams_of(chunks, folder, layout):
    """The second moments of the inputs of `down` and `o`, of which rank 0 has all without pipeline stages."""
    import torch

    from nemo_minitron.importance.gram import gram, whole

    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    rank = torch.distributed.get_rank() if layout.dp > 1 else 0
    found = gram(chunks, [tokens[rank :: layout.dp]])
    joined = {f"gram of {name}": whole(found, name) for name in found}
    return {name: value for name, value in joined.items() if value is not None}


def stream_of(chunks, architecture, folder, layout):
    """The second moments of the stream, of all rows."""
    import torch

    from nemo_minitron.importance.stream import stream_covariance

    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    rank = torch.distributed.get_rank() if layout.dp > 1 else 0
    return stream_covariance(chunks, [tokens[rank :: layout.dp]], architecture).numpy()


def distilled(teacher, student, architecture, tokens):
    """The forward KL of each token, and the gradients of their sum by canonical names, of one process."""
    import torch

    from nemo_minitron.distillation.step import Objective, distillation_step
    from nemo_minitron.distillation.teacher import Teacher
    from nemo_minitron.hosts.bridge.distill import model_inputs
    from nemo_minitron.megatron.live import LiveSource
    from nemo_minitron.sources.tensors import whole

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = {"tokens": tokens, "position_ids": positions, "loss_mask": torch.ones(tokens.shape)}
    step = distillation_step(Objective(architecture.vocab_size), model_inputs, Teacher(teacher, model_inputs))
    loss_BS = step(student[0].train(), batch)
    loss_BS.sum().backward()
    for parameter in student[0].parameters():
        parameter.data = parameter.grad
    gradients = LiveSource(student, architecture)
    found = {f"gradient of {name}": gradients.read(name, whole(shape)) for name, shape in architecture.shapes().items()}
    return found | {"kl": loss_BS.detach().numpy()}


def saved(chunks, expected, folder):
    """What differs between a model and the checkpoint that this layout writes of it."""
    import torch
    from contract_worker import differing

    from nemo_minitron.hosts.bridge.students import save_chunks
    from nemo_minitron.sources.checkpoint import CheckpointSource

    save_chunks(chunks, folder, expected.architecture.vocab_size)
    torch.distributed.barrier()
    written = CheckpointSource(folder)
    return [] if written.architecture == expected.architecture else ["architecture"], differing(written, expected)


def run_case(case, folder, out):
    import torch
    from contract_worker import differing, logits

    from nemo_minitron.artifacts import PrunePlan
    from nemo_minitron.importance.forward import architecture_of
    from nemo_minitron.megatron.live import LiveSource
    from nemo_minitron.settings.layout import Layout
    from nemo_minitron.sources.folder import HFSource

    layout, result, found = Layout(**case["layout"]), {}, {}
    plan = PrunePlan.load(folder / "plan.json")
    for model, cut in (("teacher", None), ("student", plan)):
        expected = HFSource(folder / model)
        chunks = load_model(folder / "teacher", cut, layout=layout)
        result[model] = differing(LiveSource(chunks, expected.architecture), expected)
        if layout.pp == 1:
            found[model] = logits(chunks, folder)
        result[f"{model}-read"] = architecture_of(chunks[0]) == expected.architecture
        if model == "teacher":
            teacher = chunks
            found["stream"] = stream_of(chunks, expected.architecture, folder, layout)
            found |= grams_of(chunks, folder, layout)
            for method in ("activation", "taylor"):
                found |= scores_of(chunks, expected.architecture, folder, layout, method)
            for whole in (False, True) if layout.dp > 1 else (False,) if layout.cp == 1 else ():
                found |= packed_scores(chunks, expected.architecture, folder, layout, whole)
        result[f"{model}-saved"] = saved(chunks, expected, out / f"{case['name']}-{model}")
    if layout.cp == 1:  # in bf16
        rounded = load_model(folder / "teacher", None, layout=layout, precision="bf16")
        found |= scores_of(rounded, HFSource(folder / "teacher").architecture, folder, layout, "activation")
    if layout.dp > 1:  # both ranks hold whole models
        found |= shorter_scores(folder, layout)
        found |= distilled(teacher, chunks, expected.architecture, torch.from_numpy(np.load(folder / "tokens.npy")))
    leave_layout()
    if torch.distributed.get_rank() == 0:
        (out / f"{case['name']}.json").write_text(json.dumps(result))
        np.savez(out / f"{case['name']}.npz", **found)


def main():
    with process_group():
        run_cases(run_case)


if __name__ == "__main__":
    main()
