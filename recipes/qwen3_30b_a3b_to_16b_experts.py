"""Qwen3-30B-A3B -> 16.0B: 64 of its 128 experts in each layer, chosen by REAP; 3.3B work on a token, as before."""

import dataclasses

from nemo_minitron.recipes import h100
from nemo_minitron.recipes.teachers import QWEN3_30B_A3B

from nemo_minitron.job import Job, Layout


def recipe() -> Job:
    return Job(
        name="qwen3_30b_a3b_to_16b_experts",
        teacher="Qwen/Qwen3-30B-A3B",
        teacher_config=QWEN3_30B_A3B,
        data=h100.DATA,
        keep={"experts": 64},
        calibration=dataclasses.replace(h100.CALIBRATION, experts="reap"),
        distillation=dataclasses.replace(h100.DISTILLATION_4B, moe_aux_loss_coeff=0.001, teacher_precision=""),
        evaluation=h100.EVALUATION,
        gates=h100.GATES,
        layout=Layout(tp=4, ep=8, etp=1, dp=64, sp=True),
        licence="apache-2.0",
        base_model="Qwen/Qwen3-30B-A3B",
    )
