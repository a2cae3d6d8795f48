"""Run by ranks.py in two processes: Gemma models on Megatron-Bridge: scores in each layout, a distillation's loss, and
checkpoints of a model and of the student that is cut from the live model.

Arguments: folder of models, JSON list of cases, output folder. Rank 0 writes one result a case.
"""

import sys
from pathlib import Path

import numpy as np
from hybrid_worker import scores_of
from ranks import leave_layout
from workers import leave, load_model, process_group, run_cases

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))


def divergence(folder, name, layout):
    """[B, S]: the loss of a distillation of the student, of the logits alone, which would go through the fused head."""
    import torch

    from nemo_minitron.distillation.step import Objective, distillation_step
    from nemo_minitron.distillation.teacher import Teacher

    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = {"tokens": tokens, "labels": tokens, "position_ids": places, "loss_mask": torch.ones_like(tokens).float()}

    def inputs(batch):
        return {"input_ids": batch["tokens"], "position_ids": batch["position_ids"], "attention_mask": None}

    teacher, (student,) = (load_model(folder / f"{name}-{model}", layout=layout) for model in ("teacher", "student"))
    step = distillation_step(Objective(vocab_size=509), inputs, Teacher(teacher, inputs))
    return step(student.train(), batch).detach().numpy()


def run_case(case, folder, out):
    import torch
    from contract_worker import logits

    from nemo_minitron.artifacts import PrunePlan
    from nemo_minitron.families import from_hf
    from nemo_minitron.hosts.bridge.students import save_chunks, save_student
    from nemo_minitron.importance.forward import architecture_of
    from nemo_minitron.settings.layout import Layout

    name, layout, found = case["family"], Layout(**case["layout"]), {}
    teacher, source = folder / f"{name}-teacher", from_hf(folder / f"{name}-teacher")
    chunks = load_model(teacher, layout=layout)
    for method in ("activation", "taylor"):
        found |= scores_of(chunks, source, folder, layout, method)
    if layout.dp > 1:
        found["logits"] = logits(chunks, folder)
        assert architecture_of(chunks[0]) == source
    if layout.tp > 1:
        found["divergence"] = divergence(folder, name, layout)
        plan = PrunePlan.load(folder / f"{name}-plan.json")
        save_student(chunks, plan, out / f"{name}-student", str(teacher))
        save_chunks(chunks, out / f"{name}-teacher", source.vocab_size, teacher)
    leave_layout()
    if torch.distributed.get_rank() == 0:
        np.savez(out / f"{case['name']}.npz", **found)


def main():
    with process_group():
        from nemo_minitron.hosts.bridge.load import load_training

        load_training()
        run_cases(run_case)
    leave()


if __name__ == "__main__":
    main()
