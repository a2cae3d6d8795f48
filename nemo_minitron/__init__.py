"""nemo_minitron: makes trained decoder language models smaller, as a plugin of NeMo 2 and Megatron-core.

The rooms are the stages of the job, in the order in which data passes through them: `importance` scores
with forward passes, `search` turns scores and a budget into a plan, `pruning` cuts, `distillation` retrains
from the teacher's logits, `evaluation` measures and `export` writes the student out. Importing the package
loads none of torch, NeMo and Megatron.
"""

__version__ = "0.1.0"
