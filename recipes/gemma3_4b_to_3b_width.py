"""The text of Gemma 3 4B -> 3B by width: hidden 2560 -> 2304, ffn 10240 -> 8192, 3.01B. It runs on Megatron-Bridge.

The published model reads pictures, too: `minitron convert google/gemma-3-4b-pt checkpoints/gemma-3-4b-text` makes the
teacher. Settings as for the 4B of 2408.11796.
"""

from nemo_minitron.recipes import h100
from nemo_minitron.recipes.teachers import GEMMA3_4B_TEXT

from nemo_minitron.job import Job


def recipe() -> Job:
    return Job(
        name="gemma3_4b_to_3b_width",
        teacher="checkpoints/gemma-3-4b-text",
        teacher_config=GEMMA3_4B_TEXT,
        data=h100.DATA,
        keep={"hidden": 2304, "ffn": 8192},
        calibration=h100.CALIBRATION,
        distillation=h100.DISTILLATION_4B,
        evaluation=h100.EVALUATION,
        layout=h100.LAYOUT,
        licence="gemma",
        base_model="google/gemma-3-4b-pt",
    )
