"""What the recipes for H100 GPUs share: the settings of 2408.11796, on 256 GPUs as in the paper.

For fewer GPUs set layout.dp=N. For your own corpus set data.train=PREFIX data.test=PREFIX (Megatron's indexed files).
"""

import dataclasses

from nemo_minitron.job import Calibration, Data, Distillation, Evaluation, Gates, Layout

DATA = Data(train="data/train", test="data/test", name="pretraining corpus")
LAYOUT = Layout(tp=4, dp=64, sp=True)
CALIBRATION = Calibration(samples=1024, sequence_length=8192, precision="bf16")
EVALUATION = Evaluation(
    tokens=1_048_576, sequence_length=8192, batch_size=1, random_baseline=False, slices_baseline=False,
    benchmarks=("base",),
)  # fmt: skip
GATES = Gates(sequence_length=1024, precision="bf16")  # a whole teacher on one GPU, as for the evaluation
DISTILLATION_4B = Distillation(
    tokens=94_000_000_000,
    sequence_length=8192,
    global_batch_size=1152,
    learning_rate=1e-4,
    min_learning_rate=1e-5,
    warmup_steps=40,
    teacher_precision="fp8-current",  # delayed scales need a history, which a frozen teacher does not build
    correction_tokens=100_000_000_000,
    correction_warmup_steps=120,
    save_every=500,
)
# A fifth of Llama-3.1-8B's own peak of 3e-4. The other teachers' peaks are not published, so they take the default.
DISTILLATION_4B_LLAMA = dataclasses.replace(DISTILLATION_4B, correction_learning_rate=6e-5)
DISTILLATION_8B = Distillation(
    tokens=380_000_000_000,
    sequence_length=8192,
    global_batch_size=768,
    learning_rate=1e-4,
    min_learning_rate=4.5e-7,
    warmup_steps=60,
    teacher_precision="fp8-current",
    correction_tokens=100_000_000_000,
    correction_warmup_steps=120,
    save_every=500,
)
# The settings of 2407.14679, for Nemotron-4.
NEMOTRON = "checkpoints/nemotron4-15b"
NEMOTRON_DATA = dataclasses.replace(DATA, teachers_own=True)
CALIBRATION_4K = dataclasses.replace(CALIBRATION, sequence_length=4096)  # Nemotron-4 has so many positions
EVALUATION_4K = dataclasses.replace(EVALUATION, sequence_length=4096)
DISTILLATION_NEMOTRON = Distillation(
    tokens=94_000_000_000,
    sequence_length=4096,
    global_batch_size=1152,
    learning_rate=2e-4,
    min_learning_rate=4.5e-7,
    warmup_steps=60,
    teacher_precision="fp8-current",
    save_every=500,
)
