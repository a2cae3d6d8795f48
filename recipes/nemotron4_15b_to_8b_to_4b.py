"""Nemotron-4 15B -> Minitron-8B -> Minitron-4B (2407.14679): two cuts of width, and the 15B teaches both students.

The weights of the 15B are not published. Set teacher=FOLDER to yours, a Hugging Face folder or a checkpoint. The
paper trained on the 15B's own corpus, so it needed no teacher correction. On another corpus, set
distillation.correction_tokens=100000000000. The shapes are those that the paper's search found
(`nemotron4_15b_to_8b_search`).
"""

from nemo_minitron.recipes import h100
from nemo_minitron.recipes.teachers import NEMOTRON4_15B

from nemo_minitron.job import Job, Step


def recipe() -> Job:
    return Job(
        name="nemotron4_15b_to_8b_to_4b",
        teacher=h100.NEMOTRON,
        teacher_config=NEMOTRON4_15B,
        data=h100.NEMOTRON_DATA,
        chain=(
            Step("8b", keep={"hidden": 4096, "ffn": 16384}),
            Step("4b", keep={"hidden": 3072, "ffn": 9216, "heads": 24}),
        ),
        calibration=h100.CALIBRATION_4K,
        distillation=h100.DISTILLATION_NEMOTRON,
        evaluation=h100.EVALUATION_4K,
        gates=h100.GATES,
        layout=h100.LAYOUT,
    )
