"""SmolLM2-135M-Instruct, 30 -> 24 layers by block influence: 134.5M -> 113.3M parameters."""

from nemo_minitron.recipes import smollm2_135m as common

from nemo_minitron.job import Job


def recipe() -> Job:
    return Job(
        name="smollm2_135m_to_113m_depth",
        teacher=common.teacher(),
        data=common.data(),
        keep={"layers": 24},
        calibration=common.CALIBRATION,
        distillation=common.DISTILLATION,
        evaluation=common.EVALUATION,
        licence=common.LICENCE,
        base_model=common.BASE_MODEL,
        base_note=common.BASE_NOTE,
    )
