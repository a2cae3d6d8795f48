"""Llama-3.1-8B -> Llama-3.1-Minitron-4B-Depth (2408.11796): 32 -> 16 layers, 4.54B.

One block of sixteen layers is dropped. The paper chose layers 16 to 31 by the accuracy on Winogrande without them. If
you have such questions, depth=accuracy calibration.items=FILE.jsonl does the same; here the loss decides.
"""

import dataclasses

from nemo_minitron.recipes import h100
from nemo_minitron.recipes.teachers import LLAMA31_8B

from nemo_minitron.job import Job


def recipe() -> Job:
    return Job(
        name="llama31_8b_to_4b_depth",
        teacher="meta-llama/Llama-3.1-8B",
        teacher_config=LLAMA31_8B,
        data=h100.DATA,
        keep={"layers": 16},
        calibration=h100.CALIBRATION,
        distillation=dataclasses.replace(h100.DISTILLATION_4B_LLAMA, intermediate="auto"),
        evaluation=h100.EVALUATION,
        gates=h100.GATES,
        layout=h100.LAYOUT,
        licence="llama3.1",
        base_model="meta-llama/Llama-3.1-8B",
        depth="loss",
    )
