"""Nemotron-4 15B -> the best shape of 8.27B: the search of 2407.14679, table 8, whose winner is Minitron-8B.

Every combination of the paper's sizes within 5% of the budget is cut, distilled for 400 steps (1.9B tokens) and ranked.
Then the best one is distilled on all tokens. `nemotron4_15b_to_8b_to_4b` describes teacher and data.
"""

from nemo_minitron.recipes import h100
from nemo_minitron.recipes.teachers import NEMOTRON4_15B

from nemo_minitron.job import Job, Search


def recipe() -> Job:
    return Job(
        name="nemotron4_15b_to_8b_search",
        teacher=h100.NEMOTRON,
        teacher_config=NEMOTRON4_15B,
        data=h100.NEMOTRON_DATA,
        search=Search(
            params="8.27B",
            tolerance="5%",
            space="layers=29,30,31,32;heads=32,48;ffn=2.5x,3x,3.5x,4x;hidden=4096,4608,5120,5632,6144",
            maximal=False,
            candidates=20,
            distil=20,
            steps=400,
            rounds=1,
            tokens=1_048_576,
        ),
        calibration=h100.CALIBRATION_4K,
        distillation=h100.DISTILLATION_NEMOTRON,
        evaluation=h100.EVALUATION_4K,
        gates=h100.GATES,
        layout=h100.LAYOUT,
    )
