"""Llama-3.1-8B -> Llama-3.1-Minitron-4B-Width (2408.11796): hidden 4096 -> 3072, ffn 14336 -> 9216, 4.51B."""

from nemo_minitron.recipes import h100
from nemo_minitron.recipes.teachers import LLAMA31_8B

from nemo_minitron.job import Job


def recipe() -> Job:
    return Job(
        name="llama31_8b_to_4b_width",
        teacher="meta-llama/Llama-3.1-8B",
        teacher_config=LLAMA31_8B,
        data=h100.DATA,
        keep={"hidden": 3072, "ffn": 9216},
        calibration=h100.CALIBRATION,
        distillation=h100.DISTILLATION_4B_LLAMA,
        evaluation=h100.EVALUATION,
        gates=h100.GATES,
        layout=h100.LAYOUT,
        licence="llama3.1",
        base_model="meta-llama/Llama-3.1-8B",
    )
