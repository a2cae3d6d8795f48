"""SmolLM2-135M-Instruct -> 108M -> 81M: ffn 1536 -> 1024, then hidden 576 -> 432; both learn from the first teacher."""

from nemo_minitron.recipes import smollm2_135m as common

from nemo_minitron.job import Job, Step


def recipe() -> Job:
    return Job(
        name="smollm2_135m_to_108m_to_81m_chain",
        teacher=common.teacher(),
        data=common.data(),
        chain=(
            Step("108m", keep={"ffn": 1024}, distillation={"tokens": 30_208}),  # 59 steps of 512
            Step("81m", keep={"hidden": 432}),
        ),
        calibration=common.CALIBRATION,
        distillation=common.DISTILLATION,
        evaluation=common.EVALUATION,
        licence=common.LICENCE,
        base_model=common.BASE_MODEL,
        base_note=common.BASE_NOTE,
    )
