"""Mistral-NeMo-12B -> MN-Minitron-8B (2408.11796): hidden 5120 -> 4096, ffn 14336 -> 11520, 8.41B."""

from nemo_minitron.recipes import h100
from nemo_minitron.recipes.teachers import MISTRAL_NEMO_12B

from nemo_minitron.job import Job


def recipe() -> Job:
    return Job(
        name="mistral_nemo_12b_to_8b",
        teacher="mistralai/Mistral-Nemo-Base-2407",
        teacher_config=MISTRAL_NEMO_12B,
        data=h100.DATA,
        keep={"hidden": 4096, "ffn": 11520},
        calibration=h100.CALIBRATION,
        distillation=h100.DISTILLATION_8B,
        evaluation=h100.EVALUATION,
        gates=h100.GATES,
        layout=h100.LAYOUT,
        licence="apache-2.0",
        base_model="mistralai/Mistral-Nemo-Base-2407",
    )
