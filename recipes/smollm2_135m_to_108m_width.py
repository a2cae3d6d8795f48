"""SmolLM2-135M-Instruct, ffn 1536 -> 1024: 134.5M -> 108.0M parameters (10 to 15 minutes on two cores)."""

from nemo_minitron.recipes import smollm2_135m as common

from nemo_minitron.job import Job


def recipe() -> Job:
    return Job(
        name="smollm2_135m_to_108m_width",
        teacher=common.teacher(),
        data=common.data(),
        keep={"ffn": 1024},
        calibration=common.CALIBRATION,
        distillation=common.DISTILLATION,
        evaluation=common.EVALUATION,
        licence=common.LICENCE,
        base_model=common.BASE_MODEL,
        base_note=common.BASE_NOTE,
    )
