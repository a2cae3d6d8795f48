"""Run by ranks.py: the distillation's losses of samples in one packed row, and of each sample alone.

Arguments: folder with teacher and student, JSON list of the samples' lengths, output file.
"""

import json
import sys
from pathlib import Path

from workers import leave, load_model, process_group


def item_of(tokens, labels, lengths):
    """A row as Bridge's loader gives it: of several samples, if there are several lengths."""
    import torch

    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    places = torch.cat([torch.arange(length) for length in lengths])
    packed = {"cu_seqlens_q": ends, "max_seqlen_q": torch.tensor(max(lengths))} if len(lengths) > 1 else {}
    row = {"tokens": tokens, "labels": labels, "position_ids": places, "loss_mask": torch.ones(len(tokens))}
    return {name: value[None] for name, value in row.items()} | packed


def main():
    folder, lengths, out = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
    with process_group():
        from nemo_minitron.hosts.bridge.load import load_training

        load_training()
        import torch

        from nemo_minitron.hosts.bridge.distill import micro_batch, model_inputs
        from nemo_minitron.hosts.bridge.models import build_model
        from nemo_minitron.hosts.distillation import make_distiller

        (student,) = load_model(folder / "student")
        distiller = make_distiller(
            build_model, model_inputs, teacher=str(folder / "teacher"), loss="forward_kl", temperature=1.0,
            precision="fp32", offload=False, top_k=100, logits_weight=1.0, lm_weight=0.5, intermediate="",
            intermediate_loss="cosine", intermediate_weight=None, plan=None, seed=1, cache="", moe_aux_loss_coeff=0.0,
            common_vocabulary=None,
        )  # fmt: skip
        distiller.prepare(student.config)
        distiller.begin([student])
        tokens = torch.randint(0, 500, (sum(lengths),), generator=torch.Generator().manual_seed(3))
        labels = tokens.flip(0)
        samples = zip(tokens.split(lengths), labels.split(lengths), strict=True)
        items = [item_of(tokens, labels, lengths), *(item_of(*sample, [len(sample[0])]) for sample in samples)]
        packed, *alone = [distiller.forward(student, micro_batch(iter([item])))[0].tolist() for item in items]
        Path(out).write_text(json.dumps({"packed": packed, "alone": [loss for sample in alone for loss in sample]}))
    leave()


if __name__ == "__main__":
    main()
