"""Measures a model: loss, perplexity and bits per byte of packed windows, generated text, lm-eval tasks, acceptance.

Models are Hugging Face folders that transformers loads, so a student is measured by code that did not make it. The
import of this room loads neither torch nor transformers.
"""

from nemo_minitron.evaluation.acceptance import Acceptance, draft_acceptance
from nemo_minitron.evaluation.generation import generate, sample
from nemo_minitron.evaluation.latency import forward_seconds
from nemo_minitron.evaluation.logits import Answers, answers
from nemo_minitron.evaluation.perplexity import Numbers, evaluate
from nemo_minitron.evaluation.speed import speeds
from nemo_minitron.evaluation.tasks import check_tasks, run_tasks
from nemo_minitron.evaluation.windows import Windows

__all__ = [
    "Acceptance", "Answers", "Numbers", "Windows", "answers", "check_tasks", "draft_acceptance", "evaluate",
    "forward_seconds", "generate", "run_tasks", "sample", "speeds",
]  # fmt: skip
