"""SmolLM2-135M-Instruct -> the best shape of 84M: twelve are cut, four are distilled briefly, one longer."""

from nemo_minitron.recipes import smollm2_135m as common

from nemo_minitron.job import Job, Search


def recipe() -> Job:
    return Job(
        name="smollm2_135m_to_84m_search",
        teacher=common.teacher(),
        data=common.data(),
        search=Search(params="84M", tolerance="5%", candidates=12, distil=4, steps=48, rounds=3, tokens=8192),
        calibration=common.CALIBRATION,
        distillation=common.DISTILLATION,
        evaluation=common.EVALUATION,
        licence=common.LICENCE,
        base_model=common.BASE_MODEL,
        base_note=common.BASE_NOTE,
    )
