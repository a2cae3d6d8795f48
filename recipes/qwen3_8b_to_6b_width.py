"""Qwen3-8B -> 6B by width: hidden 4096 -> 3584, ffn 12288 -> 9216, 5.98B. Settings as for the 4B of 2408.11796."""

from nemo_minitron.recipes import h100
from nemo_minitron.recipes.teachers import QWEN3_8B

from nemo_minitron.job import Job


def recipe() -> Job:
    return Job(
        name="qwen3_8b_to_6b_width",
        teacher="Qwen/Qwen3-8B",
        teacher_config=QWEN3_8B,
        data=h100.DATA,
        keep={"hidden": 3584, "ffn": 9216},
        calibration=h100.CALIBRATION,
        distillation=h100.DISTILLATION_4B,
        evaluation=h100.EVALUATION,
        gates=h100.GATES,
        layout=h100.LAYOUT,
        licence="apache-2.0",
        base_model="Qwen/Qwen3-8B",
    )
