"""Nemotron Nano v2 12B -> 9B (2508.14444), a Mamba-2 hybrid: 62 -> 56 layers, hidden 5120 -> 4480, ffn 20480 -> 15680,
8.89B. It runs on Megatron-Bridge.

The layers that stay are those that give the published 9B its order of kinds: 27 Mamba-2, 4 attention and 25 MLP layers.
To let the calibration choose, give numbers instead: keep={"mamba_layers": 27, "attention_layers": 4, "mlp_layers": 25}.
"""

import dataclasses

from nemo_minitron.recipes import h100
from nemo_minitron.recipes.teachers import NEMOTRON_NANO_12B

from nemo_minitron.job import Job

GONE = {7, 8, 23, 24, 48, 52}  # two attention layers, three MLPs and one Mamba-2
DISTILLATION = dataclasses.replace(h100.DISTILLATION_4B, teacher_precision="bf16")  # a hybrid has no FP8 here


def recipe() -> Job:
    return Job(
        name="nemotron_nano_12b_to_9b",
        teacher="nvidia/NVIDIA-Nemotron-Nano-12B-v2-Base",
        teacher_config=NEMOTRON_NANO_12B,
        data=h100.DATA,
        keep={"layers": [layer for layer in range(62) if layer not in GONE], "hidden": 4480, "ffn": 15680},
        calibration=h100.CALIBRATION,
        distillation=DISTILLATION,
        evaluation=h100.EVALUATION,
        gates=h100.GATES,
        layout=h100.LAYOUT,
        licence="other",
        base_model="nvidia/NVIDIA-Nemotron-Nano-12B-v2-Base",
    )
